//! NF4 against bitsandbytes 0.50.2: recorded vectors, and whole checkpoints tensor by tensor.

use std::path::PathBuf;

use half::{bf16, f16};
use moectl::formats::nf4::dynamic_map::DYNAMIC_MAP;
use moectl::formats::nf4::mean::mean;
use moectl::formats::nf4::quantize::{self, quantize};
use moectl::formats::nf4::{Absmax, Nf4Matrix, STATE_SUFFIX};
use moectl::formats::{Bytes, Checkpoint, Dtype, Matrix, Tensor};

fn goldens() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens")
}

fn vectors() -> Checkpoint {
    let path = goldens().join("nf4/vectors.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    Checkpoint::from_bytes("vectors.safetensors", Bytes::from(bytes)).unwrap()
}

/// Name, shape and nested offset of every recorded case.
fn cases() -> Vec<(String, Vec<usize>, Option<f32>)> {
    let text = std::fs::read(goldens().join("nf4/vectors.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let cases = json["cases"].as_object().unwrap();
    assert_eq!(cases.len(), 9);
    cases
        .iter()
        .map(|(name, case)| {
            let shape = case["shape"].as_array().unwrap();
            let shape = shape.iter().map(|d| d.as_u64().unwrap() as usize);
            let offset = case["nested_offset_bits"].as_u64();
            let offset = offset.map(|bits| f32::from_bits(bits as u32));
            (name.clone(), shape.collect(), offset)
        })
        .collect()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    let mut out = vec![0.0; tensor.shape.iter().product()];
    tensor.dtype.widen(&tensor.data, &mut out);
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn quantizer_matches_every_recorded_vector() {
    let vectors = vectors();
    for (case, shape, offset) in cases() {
        let recorded = |part: &str| vectors.tensor(&format!("{case}.{part}")).unwrap();
        let input = recorded("input");
        let found = quantize(&case, &input.data, input.dtype, &shape, offset.is_some()).unwrap();
        let parts = quantize::parts(shape.iter().product(), offset.is_some());
        let tensors = found.into_tensors();
        assert_eq!(tensors.len(), parts.len() + 1, "{case}");
        for (i, (suffix, bytes)) in tensors.iter().enumerate() {
            let expected = match *suffix {
                "" => recorded("packed"),
                STATE_SUFFIX => recorded("quant_state_json"),
                ".quant_map" => vectors.tensor("nf4_code").unwrap(),
                ".nested_quant_map" => vectors.tensor("dynamic_map").unwrap(),
                other => recorded(&other[1..]),
            };
            assert_eq!(bytes[..], expected.data[..], "{case}{suffix}");
            if let Some(part) = parts.get(i) {
                assert_eq!(part.suffix, *suffix);
                assert_eq!(part.dtype, expected.dtype, "{case}{suffix}");
                assert_eq!(part.shape, expected.shape, "{case}{suffix}");
            }
        }
    }
}

#[test]
fn dequantizer_matches_every_recorded_vector_bit_for_bit() {
    let vectors = vectors();
    for (case, shape, offset) in cases() {
        let data = |part: &str| vectors.tensor(&format!("{case}.{part}")).unwrap().data;
        let absmax = match offset {
            None => Absmax::Plain(data("absmax")),
            Some(offset) => Absmax::Nested {
                codes: data("absmax"),
                nested_absmax: data("nested_absmax"),
                quant_map: vectors.tensor("dynamic_map").unwrap().data,
                offset,
            },
        };
        if offset.is_some() {
            let restored = floats(&vectors.tensor(&format!("{case}.absmax_restored")).unwrap());
            let found: Vec<f32> = (0..restored.len()).map(|b| absmax.get(b)).collect();
            assert_eq!(bits(&found), bits(&restored), "{case}: absmax");
        }
        let matrix = Matrix::Nf4(Nf4Matrix {
            packed: data("packed"),
            absmax,
            blocksize: 64,
            first: 0,
            rows: shape[0],
            cols: shape[1],
        });
        let found = matrix.dequantize();
        let to_bf16: Vec<f32> = found.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
        let to_f16: Vec<f32> = found.iter().map(|v| f16::from_f32(*v).to_f32()).collect();
        for (dtype, found) in [
            ("float32", &found),
            ("bfloat16", &to_bf16),
            ("float16", &to_f16),
        ] {
            let recorded = vectors.tensor(&format!("{case}.dequant_{dtype}")).unwrap();
            assert_eq!(bits(found), bits(&floats(&recorded)), "{case}: {dtype}");
        }
        let row = shape[0] - 1;
        let mut last = vec![0.0; shape[1]];
        matrix.dequantize_rows(row..row + 1, &mut last);
        assert_eq!(
            bits(&last),
            bits(&found[row * shape[1]..]),
            "{case}: last row"
        );
    }
}

#[test]
fn eight_bit_codes_match_bitsandbytes_around_every_edge_of_its_table() {
    let vectors = vectors();
    let input = floats(&vectors.tensor("dynamic8.input").unwrap());
    let (codes, absmax) = quantize::quantize_dynamic(&input);
    assert_eq!(
        codes[..],
        vectors.tensor("dynamic8.codes").unwrap().data[..]
    );
    let expected = floats(&vectors.tensor("dynamic8.absmax").unwrap());
    assert_eq!(bits(&absmax), bits(&expected));
}

#[test]
fn a_group_of_equal_scales_gets_code_zero_and_scale_zero() {
    let (codes, absmax) = quantize::quantize_dynamic(&[0.0; 300]);
    assert_eq!(codes, [0; 300]);
    assert_eq!(absmax, [0.0; 2]);
}

#[test]
fn dynamic_map_and_means_match_torch() {
    let vectors = vectors();
    let map = floats(&vectors.tensor("dynamic_map").unwrap());
    assert_eq!(bits(&map), bits(&*DYNAMIC_MAP));
    let lengths: Vec<&str> = vectors
        .names()
        .filter_map(|n| n.strip_prefix("mean.")?.strip_suffix(".input"))
        .collect();
    assert_eq!(lengths.len(), 17);
    for n in lengths {
        let input = floats(&vectors.tensor(&format!("mean.{n}.input")).unwrap());
        let expected = floats(&vectors.tensor(&format!("mean.{n}.mean")).unwrap());
        assert_eq!(bits(&[mean(&input)]), bits(&expected), "{n} values");
    }
}

#[test]
fn an_odd_number_of_weights_ends_in_the_code_of_zero() {
    let bytes = [0.5f32, -0.5, 0.5].map(f32::to_le_bytes).concat();
    let weight = quantize("w", &bytes, Dtype::F32, &[1, 3], false).unwrap();
    assert_eq!(weight.packed, [0xf0, 0xf7]);
}

/// Every tensor of the NF4 checkpoint follows from the bf16 one; what is quantised there is what
/// transformers 4.57 chose by its skip list.
#[track_caller]
fn assert_quantizes_to_the_same_bytes(model: &str, quantised_weights: usize) {
    let source = Checkpoint::open(&goldens().join(model).join("bf16")).unwrap();
    let expected = Checkpoint::open(&goldens().join(model).join("nf4")).unwrap();
    let mut compared = 0;
    let mut quantised = 0;
    for name in source.names() {
        let tensor = source.tensor(name).unwrap();
        let same = |suffix: &str, bytes: &[u8]| {
            let stored = expected.tensor(&format!("{name}{suffix}")).unwrap();
            assert_eq!(bytes, &stored.data[..], "{name}{suffix}");
        };
        if expected.quant_state(name).unwrap().is_none() {
            same("", &tensor.data);
            compared += 1;
            continue;
        }
        quantised += 1;
        let weight = quantize(name, &tensor.data, tensor.dtype, &tensor.shape, true).unwrap();
        for (suffix, bytes) in weight.into_tensors() {
            same(suffix, &bytes);
            compared += 1;
        }
    }
    assert_eq!(compared, expected.names().count());
    assert_eq!(quantised, quantised_weights);
}

#[test]
fn tiny_a_quantizes_to_the_bytes_of_transformers() {
    assert_quantizes_to_the_same_bytes("tiny-a", 221);
}

#[test]
fn tiny_c_quantizes_to_the_bytes_of_transformers_router_included() {
    assert_quantizes_to_the_same_bytes("tiny-c", 41);
}
