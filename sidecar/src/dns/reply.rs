//! A reply while it is made, and how it is written.

use std::iter::{Empty, empty};
use std::slice::Iter;

use hickory_proto::ProtoError;
use hickory_proto::op::{Edns, Message, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::Record;
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::serialize::binary::{BinDecoder, BinEncoder};
use hickory_server::net::xfer::Protocol;
use hickory_server::server::Request;
use hickory_server::zone_handler::{MessageResponse, MessageResponseBuilder, Queries};

use super::MAX_UDP;
use super::metrics::Outcome;

/// The code of an extended DNS error among EDNS options (RFC 8914 §2).
const EXTENDED_ERROR: u16 = 15;

/// The reply to one request.
pub(super) struct Reply {
    pub(super) metadata: Metadata,
    pub(super) answers: Vec<Record>,
    pub(super) authorities: Vec<Record>,
    pub(super) additionals: Vec<Record>,
    /// Present where the request had one (RFC 6891 §7).
    edns: Option<Edns>,
    /// In place of the request's questions.
    questions: Option<Queries>,
}

/// As hickory-server writes it.
type Response<'r> =
    MessageResponse<'r, 'r, Iter<'r, Record>, Iter<'r, Record>, Empty<&'r Record>, Iter<'r, Record>>;

impl Reply {
    /// NOERROR without records.
    pub(super) fn new(request: &Request) -> Self {
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.recursion_available = true;
        let edns = request.edns.as_ref().map(|asked| {
            let mut edns = Edns::new();
            // hickory-server bounds an answer by what its OPT offers; so that offers no more than the client did.
            edns.set_max_payload(request.max_payload().min(MAX_UDP)).set_dnssec_ok(asked.flags().dnssec_ok);
            edns
        });
        Self {
            metadata,
            answers: Vec::new(),
            authorities: Vec::new(),
            additionals: Vec::new(),
            edns,
            questions: None,
        }
    }

    /// The packet that answers one of which only the header can be read.
    pub(super) fn malformed(request: &Metadata) -> Vec<u8> {
        error_packet(request, ResponseCode::FormErr)
    }

    /// Not what we do.
    pub(super) fn refuse(&mut self, code: ResponseCode) -> Outcome {
        self.metadata.response_code = code;
        Outcome::Refused
    }

    /// Not one question: FORMERR without any, for which of them would it be about?
    pub(super) fn refuse_without_question(&mut self) -> Outcome {
        self.questions = Queries::read(&mut BinDecoder::new(&[]), 0).ok();
        self.refuse(ResponseCode::FormErr)
    }

    /// SERVFAIL, with the reason where the client can read it.
    pub(super) fn fail(&mut self, code: u16, reason: &str) -> Outcome {
        self.metadata.response_code = ResponseCode::ServFail;
        self.explain(code, reason);
        Outcome::Failed
    }

    /// Adds an extended error (RFC 8914), where the request had EDNS.
    pub(super) fn explain(&mut self, code: u16, reason: &str) {
        if let Some(edns) = &mut self.edns {
            let mut data = code.to_be_bytes().to_vec();
            data.extend(reason.as_bytes());
            edns.options_mut().insert(EdnsOption::Unknown(EXTENDED_ERROR, data));
        }
    }

    /// The most bytes that the request's transport takes.
    fn limit(request: &Request) -> u16 {
        match request.protocol() {
            Protocol::Udp => request.max_payload().min(MAX_UDP),
            _ => u16::MAX,
        }
    }

    /// Truncates what does not fit. All records go then: half an answer is of no use to a client that comes again
    /// over TCP, and the OPT must stay (RFC 6891 §7).
    fn truncate(&mut self) {
        self.answers.clear();
        self.authorities.clear();
        self.additionals.clear();
        self.metadata.truncation = true;
    }

    /// Truncates it where it does not fit the request's transport.
    pub(super) fn fit(&mut self, request: &Request) {
        if !matches!(self.emit(request), Ok((_, false))) {
            self.truncate();
        }
    }

    /// The reply as hickory-server writes it.
    pub(super) fn response<'r>(&'r self, request: &'r Request) -> Response<'r> {
        let questions = self.questions.as_ref().unwrap_or(&request.queries);
        MessageResponseBuilder::new(questions, self.edns.as_ref()).build(
            self.metadata,
            &self.answers,
            &self.authorities,
            empty(),
            &self.additionals,
        )
    }

    /// The packet. It fits the request's transport.
    pub(super) fn encode(mut self, request: &Request) -> Vec<u8> {
        if let Ok((packet, false)) = self.emit(request) {
            return packet;
        }
        self.truncate();
        self.emit(request)
            .map_or_else(|_| error_packet(&request.metadata, ResponseCode::ServFail), |(packet, _)| packet)
    }

    fn emit(&self, request: &Request) -> Result<(Vec<u8>, bool), ProtoError> {
        let mut packet = Vec::with_capacity(512);
        let mut encoder = BinEncoder::new(&mut packet);
        encoder.set_max_size(Self::limit(request));
        let truncated = self.response(request).destructive_emit(&mut encoder)?.truncation;
        Ok((packet, truncated))
    }
}

/// A header with an error, without anything else.
fn error_packet(request: &Metadata, code: ResponseCode) -> Vec<u8> {
    let mut message = Message::response(request.id, request.op_code);
    message.metadata = Metadata::response_from_request(request);
    message.metadata.recursion_available = request.op_code == OpCode::Query;
    message.metadata.response_code = code;
    message.to_vec().unwrap_or_default()
}
