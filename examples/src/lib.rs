//! The quickstart behind make demo.
