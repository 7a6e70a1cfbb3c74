//! The reference backend against what transformers, bitsandbytes and torch computed.

mod support;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use candle_core::{Device, Tensor};
use moectl::backend::reference::{LayerState, Reference, delta_rule};
use moectl::backend::{BlockExecutor, LogitRows};
use moectl::engine::sampler::log_sum_exp;
use moectl::formats::Checkpoint;
use support::*;

const TOLERANCE: f32 = 1e-3;

fn sequence(golden: &Golden) -> One<BlockExecutor<Reference>> {
    let (shape, weights) = open(&golden.model_dir);
    one(Reference::new(shape, weights), 4096)
}

#[test]
fn logits_routing_and_greedy_tokens_equal_transformers_however_the_prompt_is_cut() {
    for &(model, layout) in F32_GOLDENS {
        let golden = golden(model, layout);
        let mut sequence = sequence(&golden);
        for prompt in &golden.prompts {
            let expected = golden.f32s(&format!("logits.{}", prompt.name));
            let vocab = expected.len() / prompt.ids.len();
            for piece in [prompt.ids.len(), 1, 7, 63, 64, 65] {
                let what = format!("{} {} in pieces of {piece}", golden.name, prompt.name);
                sequence.reset(4096).unwrap();
                let (logits, routing) = prefill(&mut sequence, &prompt.ids, piece);
                let diff = max_diff(&logits, &expected);
                assert!(diff <= TOLERANCE, "{what}: logits differ by {diff}");
                for (layer, routing) in routing.iter().enumerate() {
                    let ids = golden.i32s(&format!("router.{}.{layer}.idx", prompt.name));
                    assert_eq!(
                        unequal_expert_sets(routing, &ids),
                        0,
                        "{what} layer {layer}"
                    );
                    let weights = golden.f32s(&format!("router.{}.{layer}.weight", prompt.name));
                    assert!(
                        max_diff(&routing.topk_weights, &weights) <= TOLERANCE,
                        "{what}"
                    );
                }
                let last = &logits[logits.len() - vocab..];
                assert_eq!(greedy(&mut sequence, last, 32), prompt.greedy, "{what}");
            }
        }
    }
}

#[test]
fn states_after_the_prompt_equal_transformers() {
    for &(model, layout) in F32_GOLDENS {
        let golden = golden(model, layout);
        let mut sequence = sequence(&golden);
        for prompt in &golden.prompts {
            for piece in [prompt.ids.len(), 7] {
                sequence.reset(4096).unwrap();
                prefill(&mut sequence, &prompt.ids, piece);
                for (layer, state) in sequence
                    .executor
                    .state(sequence.id)
                    .unwrap()
                    .iter()
                    .enumerate()
                {
                    let compare = |part: &str, found: &Tensor| {
                        let name = format!("state.{layer}.{part}.{}", prompt.name);
                        if golden.results.contains(&name) {
                            let diff = max_diff(&values(found), &golden.f32s(&name));
                            assert!(diff <= TOLERANCE, "{} {name}: {diff}", golden.name);
                        }
                    };
                    match state {
                        LayerState::DeltaNet(state) => {
                            compare("conv", &state.conv);
                            compare("recurrent", &state.recurrent);
                        }
                        LayerState::Attention(state) => {
                            let (k, v) = state.keys_values().unwrap();
                            compare("k", k);
                            compare("v", v);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn every_recorded_intermediate_result_is_met() {
    let mut compared = 0;
    for &(model, layout) in F32_GOLDENS {
        let golden = golden(model, layout);
        let (shape, weights) = open(&golden.model_dir);
        let layers = shape.num_layers();
        let mut backend = Reference::new(shape, weights);
        let seen = Arc::new(Mutex::new(HashMap::<(usize, String), Vec<f32>>::new()));
        let sink = Arc::clone(&seen);
        backend.set_tap(Box::new(move |layer, name, tensor| {
            sink.lock()
                .unwrap()
                .insert((layer, name.to_string()), values(tensor));
        }));
        let mut sequence = one(backend, 4096);
        let detail = &golden.detail_prompt;
        let prompt = golden.prompts.iter().find(|p| p.name == *detail).unwrap();
        prefill(&mut sequence, &prompt.ids, prompt.ids.len());

        let seen = seen.lock().unwrap();
        for name in golden.results.names() {
            let found = if let Some(rest) = name.strip_prefix("tap.") {
                let (layer, tap) = rest.split_once('.').unwrap();
                let key = (layer.parse().unwrap(), tap.to_string());
                seen.get(&key).unwrap_or_else(|| panic!("no tap {key:?}"))
            } else if let Some(i) = name.strip_prefix(&format!("hidden.{detail}.")) {
                match i.parse::<usize>().unwrap() {
                    0 => continue, // the embedding, which layer 0's norm covers
                    i if i == layers => &seen[&(layers, "norm".to_string())],
                    i => &seen[&(i - 1, "hidden".to_string())],
                }
            } else if let Some(rest) = name.strip_prefix(&format!("router.{detail}."))
                && let Some(layer) = rest.strip_suffix(".logits")
            {
                &seen[&(layer.parse().unwrap(), "router_logits".to_string())]
            } else {
                continue;
            };
            let diff = max_diff(found, &golden.f32s(name));
            assert!(
                diff <= TOLERANCE,
                "{} {name}: differs by {diff}",
                golden.name
            );
            compared += 1;
        }
    }
    assert!(compared > 50, "only {compared} results were compared");
}

#[test]
fn delta_rule_equals_torch_chunked_and_token_by_token() {
    let file = data("goldens/delta_rule/vectors.safetensors");
    let vectors = std::fs::read(file).unwrap();
    let vectors = Checkpoint::from_bytes("delta rule vectors", vectors.into()).unwrap();
    let cases = json(data("goldens/delta_rule/vectors.json"));
    for case in cases["cases"].as_object().unwrap().keys() {
        let tensor = |part: &str| {
            let tensor = vectors.tensor(&format!("{case}.{part}")).unwrap();
            let mut out = vec![0.0; tensor.shape.iter().product()];
            tensor.dtype.widen(&tensor.data, &mut out);
            Tensor::from_vec(out, tensor.shape.as_slice(), &Device::Cpu).unwrap()
        };
        // The vectors hold q and k before normalisation.
        let l2norm = |x: Tensor| {
            let sum = x.sqr().unwrap().sum_keepdim(2).unwrap();
            x.broadcast_div(&(sum + 1e-6).unwrap().sqrt().unwrap())
                .unwrap()
        };
        let (q, k, v) = (l2norm(tensor("q")), l2norm(tensor("k")), tensor("v"));
        let q = (&q / (q.dims()[2] as f64).sqrt()).unwrap();
        let state = if vectors.contains(&format!("{case}.state_in")) {
            tensor("state_in")
        } else {
            tensor("state_recurrent").zeros_like().unwrap()
        };
        for (form, rule) in [
            (
                "recurrent",
                delta_rule::recurrent as fn(&_, &_, &_, &_, &_, &_) -> _,
            ),
            ("chunked", delta_rule::chunked),
        ] {
            let (out, state) = rule(&q, &k, &v, &tensor("g"), &tensor("beta"), &state).unwrap();
            let out_diff = max_diff(&values(&out), &values(&tensor(&format!("out_{form}"))));
            let state_diff = max_diff(&values(&state), &values(&tensor(&format!("state_{form}"))));
            assert!(
                out_diff <= 1e-5,
                "{case} {form}: outputs differ by {out_diff}"
            );
            assert!(
                state_diff <= 1e-5,
                "{case} {form}: states differ by {state_diff}"
            );
        }
    }
}

#[test]
fn built_in_model_reproduces_its_recorded_prompts() {
    let golden = json(data("tiny-moe/golden.json"));
    let (shape, weights) = open(&tiny_moe());
    let mut sequence = one(Reference::new(shape, weights), 4096);
    for (name, prompt) in golden["prompts"].as_object().unwrap() {
        let ids = ids(&prompt["ids"]);
        sequence.reset(4096).unwrap();
        let mut last_token_experts = Vec::new();
        let mut on_routing = |_: usize, _: usize, routing: &moectl::backend::Routing| {
            let k = routing.num_experts_per_tok;
            let mut experts = routing.topk_ids[routing.topk_ids.len() - k..].to_vec();
            experts.sort_unstable();
            last_token_experts.push(experts);
        };
        let logits = sequence
            .forward(&ids, LogitRows::Last, &mut on_routing)
            .unwrap();
        let expected = prompt["top_ids"].as_array().unwrap().iter();
        for (id, logit) in expected.zip(prompt["top_logits"].as_array().unwrap()) {
            let found = logits[id.as_u64().unwrap() as usize];
            let diff = (found - logit.as_f64().unwrap() as f32).abs();
            assert!(diff <= TOLERANCE, "{name}: logit of {id} differs by {diff}");
        }
        let recorded: Vec<Vec<u16>> =
            serde_json::from_value(prompt["last_token_experts"].clone()).unwrap();
        assert_eq!(last_token_experts, recorded, "{name}");
        let tokens = greedy(&mut sequence, &logits, 48);
        assert_eq!(tokens, support::ids(&prompt["greedy_ids"]), "{name}");
    }
}

#[test]
fn built_in_model_has_its_recorded_held_out_loss() {
    let golden = json(data("tiny-moe/golden.json"));
    let heldout = json(data("tiny-moe/heldout_tokens.json"));
    let tokens = ids(&heldout["tokens"]);
    let (rows, len) = (
        heldout["rows"].as_u64().unwrap() as usize,
        heldout["row_tokens"].as_u64().unwrap() as usize,
    );
    let (shape, weights) = open(&tiny_moe());
    let vocab = shape.vocab_size;
    let mut sequence = one(Reference::new(shape, weights), len);
    let mut total = 0.0;
    for row in tokens.chunks(len) {
        sequence.reset(len).unwrap();
        let (logits, _) = prefill(&mut sequence, row, len);
        let losses = logits
            .chunks(vocab)
            .zip(&row[1..])
            .map(|(logits, &next)| log_sum_exp(logits) - f64::from(logits[next as usize]));
        total += losses.sum::<f64>() / (len - 1) as f64;
    }
    let loss = total / rows as f64;
    let recorded = golden["heldout_loss_nf4"].as_f64().unwrap();
    assert!(
        (loss - recorded).abs() < 1e-4,
        "held-out loss {loss}, recorded {recorded}"
    );
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}
