//! The controller: writes the export annotations of pods from Services.
