//! How the annotations' texts come into service, once the pod's cluster is known.

use std::net::Ipv4Addr;
use std::time::Instant;

use super::document::Given;
use super::{Annotation, ClusterSource, Command, Notice, Sidecar};
use crate::annotation::{self, Defaults, Finding, Import};
use crate::dns::Zone;
use crate::name::ClusterName;

impl Sidecar {
    pub(super) fn take(&mut self, annotation: Annotation, given: Given, now: Instant) {
        let Some(defaults) = &self.defaults else { return self.wait(annotation, given) };
        let taken = match annotation {
            Annotation::Exports => {
                self.exports_text.take(given, |text| annotation::parse_exports(text, defaults))
            }
            Annotation::Imports => {
                self.imports_text.take(given, |text| annotation::parse_imports(text, defaults))
            }
        };
        self.unsaved |= taken.text;
        if taken.entries {
            self.apply(annotation, now);
        }
        let unusable = self.findings(annotation).error.is_some();
        if taken.error && unusable {
            self.notices.push_back(Notice::Unusable(annotation));
        } else if taken.entries || taken.error {
            self.notices.push_back(Notice::Applied(annotation));
        }
    }

    /// Keeps what came before the cluster is known: the last text that is good, and why a later one is not.
    pub(super) fn wait(&mut self, annotation: Annotation, given: Given) {
        let given = match given {
            Given::Text(text) => match self.whole_error(annotation, &text) {
                Some(finding) => Given::Unusable(finding),
                None => Given::Text(text),
            },
            other => other,
        };
        let is_text = |given: &Given| matches!(given, Given::Text(_));
        let replaces = is_text(&given);
        self.waiting.retain(|(which, earlier)| *which != annotation || (is_text(earlier) && !replaces));
        self.waiting.push((annotation, given));
    }

    /// Why a text can't be used as a whole; that depends on no cluster.
    pub(super) fn whole_error(&self, annotation: Annotation, text: &str) -> Option<Finding> {
        let any = Defaults { namespace: self.config.pod.namespace.clone(), cluster: ClusterName::fallback() };
        match annotation {
            Annotation::Exports => annotation::parse_exports(text, &any).err(),
            Annotation::Imports => annotation::parse_imports(text, &any).err(),
        }
    }

    pub(super) fn apply(&mut self, annotation: Annotation, now: Instant) {
        match annotation {
            Annotation::Exports => self.apply_exports(),
            Annotation::Imports => self.apply_imports(true, now),
        }
    }

    pub(super) fn apply_exports(&mut self) {
        let Some(parsed) = self.exports_text.parsed() else { return };
        let steps = self.exports.apply(&parsed.entries, &mut self.next_id);
        steps.over.into_iter().for_each(|id| self.conversation.exports.end(id));
        steps.tell.into_iter().for_each(|id| self.conversation.exports.tell(id));
    }

    /// `anew`: for a new text, which has a notice of its own.
    pub(super) fn apply_imports(&mut self, anew: bool, now: Instant) {
        let (Some(defaults), Some(parsed)) = (&self.defaults, self.imports_text.parsed()) else { return };
        let steps = self.imports.apply(&parsed.entries, &mut self.next_id, now);
        self.unsaved |= steps.leases;
        if steps.unserved && !anew {
            self.notices.push_back(Notice::Unserved(Annotation::Imports));
        }
        let zone = (steps.zone || !self.zone_set).then(|| {
            let served: Vec<(Import, Ipv4Addr)> =
                self.imports.served().map(|(import, address)| (import.clone(), address)).collect();
            Zone::new(defaults, &self.config.search, self.imports.leases().range(), &served)
        });
        steps.make.into_iter().for_each(|id| self.make(id));
        if let Some(zone) = zone {
            self.commands.push_back(Command::SetZone(zone));
            self.zone_set = true;
        }
        for (id, held) in steps.over {
            self.conversation.imports.end(id);
            if held {
                self.commands.push_back(Command::Close { id });
            }
        }
    }

    /// While there has never been an annotation DNS answers for the names of others all the same.
    pub(super) fn set_empty_zone(&mut self) {
        if let Some(defaults) = &self.defaults
            && self.absent
            && !self.zone_set
        {
            let zone = Zone::new(defaults, &self.config.search, self.imports.leases().range(), &[]);
            self.commands.push_back(Command::SetZone(zone));
            self.zone_set = true;
        }
    }

    pub(super) fn set_cluster(&mut self, cluster: ClusterName, source: ClusterSource, now: Instant) {
        self.cluster_wait = None;
        // The router's word is saved, also where it says what was assumed.
        self.unsaved |= source == ClusterSource::Router && self.cluster_source == ClusterSource::Fallback;
        let known = self.defaults.as_ref().map(|defaults| &defaults.cluster);
        let (first, other) = (known.is_none(), known != Some(&cluster));
        self.cluster_source = source;
        if !other {
            return;
        }
        self.notices.push_back(Notice::Cluster(cluster.clone(), source));
        let defaults = Defaults { namespace: self.config.pod.namespace.clone(), cluster };
        if first {
            self.defaults = Some(defaults);
            for (annotation, given) in std::mem::take(&mut self.waiting) {
                self.take(annotation, given, now);
            }
            return self.set_empty_zone();
        }
        // What the texts leave open means another cluster now.
        self.unsaved = true;
        self.zone_set = false;
        let exports = self.exports_text.parse_again(|text| annotation::parse_exports(text, &defaults));
        let imports = self.imports_text.parse_again(|text| annotation::parse_imports(text, &defaults));
        self.defaults = Some(defaults);
        for (annotation, read) in [(Annotation::Exports, exports), (Annotation::Imports, imports)] {
            if read {
                self.apply(annotation, now);
                self.notices.push_back(Notice::Applied(annotation));
            }
        }
    }
}
