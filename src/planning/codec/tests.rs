//! Traces written, read back, cut and damaged.

use super::super::trace::tests::synthetic;
use super::*;

fn written(trace: &RoutingTrace) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = TraceWriter::new(&mut bytes, trace.header()).unwrap();
    for record in trace.records() {
        writer.push(record).unwrap();
    }
    writer.finish().unwrap();
    bytes
}

fn read(bytes: &[u8]) -> Result<(RoutingTrace, Tail), TraceError> {
    TraceReader::new(bytes)?.read_all()
}

#[test]
fn a_trace_reads_back_as_it_was() {
    for (experts, k) in [(512, 10), (8, 2), (1, 1), (300, 7)] {
        let trace = synthetic(5, experts, k.min(experts), 4, 40);
        let (back, tail) = read(&written(&trace)).unwrap();
        assert_eq!(tail, Tail::Complete);
        assert_eq!(back, trace);
    }
}

#[test]
fn an_event_takes_at_most_40_bytes() {
    let trace = synthetic(48, 512, 10, 2, 200);
    let bytes = written(&trace).len();
    let events = trace.tokens() as usize * 48;
    assert!(
        bytes <= 40 * events,
        "{} bytes per event",
        bytes as f64 / events as f64
    );
}

#[test]
fn long_runs_of_tokens_are_split_and_keep_their_positions() {
    let mut trace = RoutingTrace::new(synthetic(1, 16, 3, 0, 0).header().clone());
    let tokens = 10_000;
    trace.push(Record::Picks(Picks {
        phase: Phase::Prefill,
        layer: 0,
        first_position: 5,
        topk_ids: (0..3 * tokens).map(|i| (i % 16) as u16).collect(),
        topk_weights: vec![f16::ONE; 3 * tokens],
    }));
    let (back, tail) = read(&written(&trace)).unwrap();
    assert_eq!((back.tokens(), tail), (tokens as u64, Tail::Complete));
    let mut position = 5;
    for record in back.records() {
        let Record::Picks(picks) = record else {
            panic!()
        };
        assert_eq!(picks.first_position, position);
        position += picks.topk_ids.len() as u32 / 3;
    }
}

#[test]
fn a_cut_trace_is_read_up_to_the_cut() {
    let trace = synthetic(6, 64, 4, 3, 900);
    let bytes = written(&trace);
    let header = encode_header(trace.header()).len();
    for len in (header..bytes.len()).step_by(997) {
        let (back, tail) = read(&bytes[..len]).unwrap();
        assert!(trace.records().starts_with(back.records()));
        let Tail::Cut {
            lost_bytes,
            lost_tokens,
        } = tail
        else {
            panic!("{tail:?}")
        };
        let used = len as u64 - lost_bytes;
        assert!(lost_bytes < 2 * FRAME_BYTES as u64 && used <= len as u64);
        assert_eq!(lost_tokens.is_some(), lost_bytes >= 12);
    }
}

#[test]
fn a_resumed_trace_is_the_whole_trace() {
    let trace = synthetic(6, 64, 4, 3, 300);
    let documents = trace.documents();
    let mut bytes = Vec::new();
    let mut writer = TraceWriter::new(&mut bytes, trace.header()).unwrap();
    documents[0].iter().for_each(|r| writer.push(r).unwrap());
    let whole_frames = writer.flush_frame().unwrap().len();
    // Then the program died in the middle of the next document.
    documents[1][..40]
        .iter()
        .for_each(|r| writer.push(r).unwrap());
    writer.flush_frame().unwrap();
    bytes.truncate(whole_frames);
    let mut writer = TraceWriter::resume(&mut bytes, trace.header());
    for record in documents[1..].iter().copied().flatten() {
        writer.push(record).unwrap();
    }
    writer.finish().unwrap();
    assert_eq!(read(&bytes).unwrap(), (trace, Tail::Complete));
}

#[test]
fn a_damaged_byte_ends_the_trace_there() {
    let trace = synthetic(6, 64, 4, 3, 900);
    let mut bytes = written(&trace);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    let (back, tail) = read(&bytes).unwrap();
    assert!(!back.records().is_empty() && back.tokens() < trace.tokens());
    assert!(trace.records().starts_with(back.records()));
    let Tail::Cut {
        lost_bytes,
        lost_tokens,
    } = tail
    else {
        panic!()
    };
    assert!(lost_bytes as usize >= bytes.len() - middle && lost_tokens > Some(0));
}

#[test]
fn foreign_newer_and_damaged_headers_are_refused() {
    let bytes = written(&synthetic(2, 8, 2, 1, 4));
    assert!(matches!(
        read(b"{\"a\": 1}........"),
        Err(TraceError::Magic { .. })
    ));
    assert!(matches!(read(b""), Err(TraceError::Magic { .. })));
    assert!(matches!(read(&bytes[..20]), Err(TraceError::Header { .. })));
    let mut newer = bytes.clone();
    newer[8] = 9;
    assert!(matches!(
        read(&newer),
        Err(TraceError::Version { found: 9 })
    ));
    let mut damaged = bytes;
    damaged[12] ^= 1;
    assert!(matches!(read(&damaged), Err(TraceError::Header { .. })));
}
