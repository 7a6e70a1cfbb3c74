//! The trace on disk: compact, streamed, checksummed, readable up to where it was cut.
//!
//! All numbers little-endian.
//!
//! ```text
//! header   "moetrace", version u16, layers u16, experts u16, k u16,
//!          fingerprint length u16 and bytes, crc32 of all that
//! frame    payload length u32, events u32, crc32 of both and the payload, payload: whole records
//! end      a frame without payload
//! record   tag u8; document: domain length varint, bytes
//!          picks: layer, first position, tokens as varints;
//!          [T, k] ids of ceil(log2 experts) bits each, low bit first, padded to a byte;
//!          [T, k] weights f16
//! ```
//!
//! One token and layer, an event, takes 38 bytes in decode and 32 in prefill with 512 experts and
//! k = 10.

use std::io::{self, Read, Write};

use half::f16;
use thiserror::Error;

use super::bits::{crc32, id_bits, put_ids, put_varint, take, take_varint, unpack_ids};
use super::trace::{Phase, Picks, Record, RoutingTrace, TraceHeader};

const MAGIC: &[u8; 8] = b"moetrace";
pub const TRACE_VERSION: u16 = 1;
/// A frame is closed when it has grown past this: what an interruption may lose.
const FRAME_BYTES: usize = 64 << 10;
/// Picks of one record; longer runs of tokens are split, so that frames stay small.
const RECORD_PICKS: usize = 8 << 10;
/// More than any frame we write can take.
const MAX_FRAME_BYTES: usize = 1 << 20;

const TAG_DOCUMENT: u8 = 0;
const TAG_PREFILL: u8 = 1;
const TAG_DECODE: u8 = 2;

/// A file that is not a trace, or not one we can read.
#[derive(Debug, Error)]
pub enum TraceError {
    #[error("trace: {0}")]
    Io(#[from] io::Error),
    #[error("not a routing trace: it starts with {found:02x?}, expected `moetrace`")]
    Magic { found: Vec<u8> },
    #[error("trace version {found} is not supported, expected {TRACE_VERSION}; use a newer moectl")]
    Version { found: u16 },
    #[error("trace header is damaged: {reason}; record the trace again")]
    Header { reason: &'static str },
}

/// How the file ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// As the writer closed it.
    Complete,
    /// In the middle, or with a damaged frame; nothing from there on was used.
    Cut {
        lost_bytes: u64,
        /// Tokens of the frame that was cut, if its head survived. What the writer had not yet
        /// handed to the file is not known to anyone.
        lost_tokens: Option<u64>,
    },
}

/// Writes a trace record by record.
pub struct TraceWriter<'a, W: Write> {
    out: &'a mut W,
    header: TraceHeader,
    payload: Vec<u8>,
    events: u32,
}

impl<'a, W: Write> TraceWriter<'a, W> {
    /// Writes the header.
    ///
    /// # Errors
    /// Those of `out`, here and in all methods.
    pub fn new(out: &'a mut W, header: &TraceHeader) -> io::Result<Self> {
        out.write_all(&encode_header(header))?;
        Ok(Self::resume(out, header))
    }

    /// Goes on with a trace that ends after a whole frame; writes no header.
    pub fn resume(out: &'a mut W, header: &TraceHeader) -> Self {
        TraceWriter {
            out,
            header: header.clone(),
            payload: Vec::with_capacity(2 * FRAME_BYTES),
            events: 0,
        }
    }

    /// Adds a record.
    ///
    /// # Errors
    /// If the output cannot be written.
    pub fn push(&mut self, record: &Record) -> io::Result<()> {
        match record {
            Record::Document { domain } => {
                // A label; cut to what a frame surely holds.
                let domain: String = domain.chars().take(256).collect();
                self.payload.push(TAG_DOCUMENT);
                put_varint(&mut self.payload, domain.len() as u32);
                self.payload.extend_from_slice(domain.as_bytes());
                self.close_frame_if_full()
            }
            Record::Picks(picks) => self.push_picks(picks),
        }
    }

    /// Ends the trace; without this it reads as cut.
    ///
    /// # Errors
    /// If the output cannot be written.
    pub fn finish(mut self) -> io::Result<()> {
        self.flush_frame()?;
        self.write_frame_of_payload()?;
        self.out.flush()
    }

    fn push_picks(&mut self, picks: &Picks) -> io::Result<()> {
        self.header.assert_holds(picks);
        let k = usize::from(self.header.num_experts_per_tok);
        let step = (RECORD_PICKS / k).max(1) * k;
        let mut position = picks.first_position;
        for (ids, weights) in picks
            .topk_ids
            .chunks(step)
            .zip(picks.topk_weights.chunks(step))
        {
            let tokens = (ids.len() / k) as u32;
            let payload = &mut self.payload;
            payload.push(match picks.phase {
                Phase::Prefill => TAG_PREFILL,
                Phase::Decode => TAG_DECODE,
            });
            put_varint(payload, picks.layer.into());
            put_varint(payload, position);
            put_varint(payload, tokens);
            put_ids(payload, ids, id_bits(self.header.num_experts));
            for weight in weights {
                payload.extend_from_slice(&weight.to_le_bytes());
            }
            position += tokens;
            self.events += tokens;
            self.close_frame_if_full()?;
        }
        Ok(())
    }

    fn close_frame_if_full(&mut self) -> io::Result<()> {
        match self.payload.len() >= FRAME_BYTES {
            true => self.flush_frame().map(drop),
            false => Ok(()),
        }
    }

    /// Ends the present frame, so that everything pushed so far is in the output, and a trace may
    /// be resumed from here.
    ///
    /// # Errors
    /// If the output cannot be written.
    pub fn flush_frame(&mut self) -> io::Result<&mut W> {
        if !self.payload.is_empty() {
            self.write_frame_of_payload()?;
        }
        Ok(self.out)
    }

    fn write_frame_of_payload(&mut self) -> io::Result<()> {
        let head = FrameHead {
            len: self.payload.len() as u32,
            events: self.events,
        };
        self.out.write_all(&head.encode(&self.payload))?;
        self.out.write_all(&self.payload)?;
        self.payload.clear();
        self.events = 0;
        Ok(())
    }
}

/// Iterates over a trace, one frame in memory at a time.
///
/// The iteration ends where the file does or where it is damaged; [`TraceReader::tail`] says which.
/// Errors are only those of the reading itself.
pub struct TraceReader<R: Read> {
    input: R,
    header: TraceHeader,
    frame: Vec<u8>,
    at: usize,
    tail: Option<Tail>,
}

impl<R: Read> TraceReader<R> {
    /// # Errors
    /// If `input` does not start with a whole header of a version we know.
    pub fn new(mut input: R) -> Result<Self, TraceError> {
        let header = decode_header(&mut input)?;
        Ok(TraceReader {
            input,
            header,
            frame: Vec::new(),
            at: 0,
            tail: None,
        })
    }

    pub fn header(&self) -> &TraceHeader {
        &self.header
    }

    /// How the trace ended; none before the iteration has.
    pub fn tail(&self) -> Option<Tail> {
        self.tail
    }

    /// Reads all of it into memory.
    ///
    /// # Errors
    /// Records that cannot be read.
    pub fn read_all(mut self) -> Result<(RoutingTrace, Tail), TraceError> {
        let mut trace = RoutingTrace::new(self.header.clone());
        for record in &mut self {
            trace.push(record?);
        }
        let tail = self.tail.expect("set when the iteration ends");
        Ok((trace, tail))
    }

    /// Loads the next frame; none at the end, when `tail` is set.
    fn next_frame(&mut self) -> io::Result<Option<()>> {
        let mut bytes = [0u8; FrameHead::BYTES];
        let got = read_up_to(&mut self.input, &mut bytes)?;
        if got < bytes.len() {
            return self.cut(got as u64, None);
        }
        let (head, crc) = FrameHead::decode(&bytes);
        let len = head.len as usize;
        if len > MAX_FRAME_BYTES {
            return self.cut(got as u64, None);
        }
        self.frame.resize(len, 0);
        self.at = 0;
        let body = read_up_to(&mut self.input, &mut self.frame)?;
        let intact = body == len && head.crc(&self.frame) == crc;
        if !intact {
            let layers = u32::from(self.header.num_layers);
            let tokens = u64::from(head.events.div_ceil(layers));
            return self.cut((got + body) as u64, Some(tokens));
        }
        if len == 0 {
            self.tail = Some(Tail::Complete);
            return Ok(None);
        }
        Ok(Some(()))
    }

    /// Ends the iteration; whatever follows in the input is lost as well.
    fn cut(&mut self, bytes: u64, lost_tokens: Option<u64>) -> io::Result<Option<()>> {
        self.frame.clear();
        self.at = 0;
        let rest = io::copy(&mut self.input, &mut io::sink())?;
        self.tail = Some(Tail::Cut {
            lost_bytes: bytes + rest,
            lost_tokens,
        });
        Ok(None)
    }

    /// The record at `at`; none if the bytes make no sense.
    fn decode_record(&mut self) -> Option<Record> {
        let mut bytes = &self.frame[self.at..];
        let (&tag, rest) = bytes.split_first()?;
        bytes = rest;
        let record = match tag {
            TAG_DOCUMENT => {
                let len = take_varint(&mut bytes)? as usize;
                let domain = String::from_utf8(take(&mut bytes, len)?.to_vec()).ok()?;
                Record::Document { domain }
            }
            TAG_PREFILL | TAG_DECODE => {
                let layer = u16::try_from(take_varint(&mut bytes)?).ok()?;
                let first_position = take_varint(&mut bytes)?;
                let picks = (take_varint(&mut bytes)? as usize)
                    * usize::from(self.header.num_experts_per_tok);
                let bits = id_bits(self.header.num_experts);
                let ids = take(&mut bytes, (picks * bits).div_ceil(8))?;
                let weights = take(&mut bytes, 2 * picks)?;
                let picks = Picks {
                    phase: if tag == TAG_PREFILL {
                        Phase::Prefill
                    } else {
                        Phase::Decode
                    },
                    layer,
                    first_position,
                    topk_ids: unpack_ids(ids, picks, bits),
                    topk_weights: weights
                        .chunks_exact(2)
                        .map(|b| f16::from_le_bytes([b[0], b[1]]))
                        .collect(),
                };
                self.header.holds(&picks).then_some(Record::Picks(picks))?
            }
            _ => return None,
        };
        self.at = self.frame.len() - bytes.len();
        Some(record)
    }
}

impl<R: Read> Iterator for TraceReader<R> {
    type Item = Result<Record, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.tail.is_some() {
            return None;
        }
        if self.at == self.frame.len() {
            match self.next_frame() {
                Ok(Some(())) => {}
                Ok(None) => return None,
                Err(e) => return Some(Err(self.fail(e))),
            }
        }
        if let Some(record) = self.decode_record() {
            return Some(Ok(record));
        }
        // A checksum that fits records that do not: written by something else.
        let left = (self.frame.len() - self.at) as u64;
        self.cut(left, None).err().map(|e| Err(self.fail(e)))
    }
}

impl<R: Read> TraceReader<R> {
    /// A failing input is not read again.
    fn fail(&mut self, error: io::Error) -> TraceError {
        self.tail = Some(Tail::Cut {
            lost_bytes: 0,
            lost_tokens: None,
        });
        error.into()
    }
}

struct FrameHead {
    len: u32,
    events: u32,
}

impl FrameHead {
    const BYTES: usize = 12;

    fn crc(&self, payload: &[u8]) -> u32 {
        let state = crc32(!0, &self.len.to_le_bytes());
        !crc32(crc32(state, &self.events.to_le_bytes()), payload)
    }

    fn encode(&self, payload: &[u8]) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.len.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.events.to_le_bytes());
        bytes[8..].copy_from_slice(&self.crc(payload).to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; Self::BYTES]) -> (Self, u32) {
        let word =
            |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let head = FrameHead {
            len: word(0),
            events: word(4),
        };
        (head, word(8))
    }
}

fn encode_header(header: &TraceHeader) -> Vec<u8> {
    let k = header.num_experts_per_tok;
    assert!(header.num_layers > 0 && k > 0 && k <= header.num_experts);
    let fingerprint = header.fingerprint.as_bytes();
    let mut bytes = MAGIC.to_vec();
    for n in [
        TRACE_VERSION,
        header.num_layers,
        header.num_experts,
        header.num_experts_per_tok,
        fingerprint.len() as u16,
    ] {
        bytes.extend_from_slice(&n.to_le_bytes());
    }
    bytes.extend_from_slice(fingerprint);
    let crc = !crc32(!0, &bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

fn decode_header(input: &mut impl Read) -> Result<TraceHeader, TraceError> {
    let short = TraceError::Header {
        reason: "the file ends within it",
    };
    let mut fixed = [0u8; 18];
    let got = read_up_to(input, &mut fixed)?;
    if !fixed[..got].starts_with(MAGIC) {
        return Err(TraceError::Magic {
            found: fixed[..got.min(MAGIC.len())].to_vec(),
        });
    }
    if got < fixed.len() {
        return Err(short);
    }
    let field = |i: usize| u16::from_le_bytes([fixed[8 + 2 * i], fixed[9 + 2 * i]]);
    if field(0) != TRACE_VERSION {
        return Err(TraceError::Version { found: field(0) });
    }
    let mut rest = vec![0u8; usize::from(field(4)) + 4];
    if read_up_to(input, &mut rest)? < rest.len() {
        return Err(short);
    }
    let (fingerprint, crc) = rest.split_at(rest.len() - 4);
    if !crc32(crc32(!0, &fixed), fingerprint)
        != u32::from_le_bytes([crc[0], crc[1], crc[2], crc[3]])
    {
        return Err(TraceError::Header {
            reason: "the checksum does not match",
        });
    }
    let header = TraceHeader {
        num_layers: field(1),
        num_experts: field(2),
        num_experts_per_tok: field(3),
        fingerprint: String::from_utf8_lossy(fingerprint).into_owned(),
    };
    let k = header.num_experts_per_tok;
    if header.num_layers == 0 || k == 0 || k > header.num_experts {
        return Err(TraceError::Header {
            reason: "the model's sizes make no sense",
        });
    }
    Ok(header)
}

/// Fills `buffer` as far as the input goes.
fn read_up_to(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests;
