//! Requests side by side on the sequences of one model.

use std::time::Duration;

use moectl::engine::SamplingParams;
use moectl::engine::service::{Event, Events, FinishReason, Finished, Phase, Request, Service};

use super::client::built_in_service;

fn request(owner: u64, prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        prompt,
        max_tokens,
        sampling: SamplingParams::default(),
        stop: Vec::new(),
        ignore_eos: true,
        logprobs: None,
        logit_bias: Vec::new(),
        constraint: None,
        owner,
        routing: false,
    }
}

/// What came of a request that ended well.
struct Answer {
    cached_tokens: usize,
    ids: Vec<u32>,
    finished: Finished,
}

async fn answer(mut events: Events) -> Answer {
    let (mut cached, mut ids) = (None, Vec::new());
    while let Some(event) = events.next().await {
        match event {
            Event::Started { cached_tokens } => cached = Some(cached_tokens),
            Event::Prefill { .. } => {}
            Event::Token(token) => ids.push(token.id),
            Event::Finished(finished) => {
                let cached_tokens = cached.expect("it began");
                let finished = *finished;
                return Answer {
                    cached_tokens,
                    ids,
                    finished,
                };
            }
            Event::Failed(message) => panic!("{message}"),
        }
    }
    panic!("the events ended before the answer did")
}

fn with_service(work: impl AsyncFnOnce(Service)) {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_time().build().unwrap();
    runtime.block_on(async {
        let service = built_in_service();
        while let Phase::Loading { .. } = service.phase() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        work(service).await;
    });
}

fn text(seed: u32, len: u32) -> Vec<u32> {
    (0..len)
        .map(|i| (i * (2 * seed + 3) + seed) % 900)
        .collect()
}

#[test]
fn a_short_request_is_answered_while_long_ones_go_on_and_all_answers_are_those_of_requests_alone() {
    with_service(async |service| {
        let submit = |request| service.submit(request).unwrap();
        // Twice as many as there are sequences: some wait in RAM.
        let long: Vec<_> = (1..4u64)
            .map(|owner| submit(request(owner, text(owner as u32, 300), 300)))
            .collect();
        let short = answer(submit(request(9, text(9, 20), 8))).await;
        assert_eq!(short.ids.len(), 8);
        let mut ends = Vec::new();
        for mut events in long {
            let first = events.next().await;
            assert!(first.is_some());
            ends.push(events);
        }
        assert!(service.load().running > 0, "the long ones go on");
        drop(ends);
        while service.load().running > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Another owner, so that nothing of it is known: alone now.
        let alone = answer(submit(request(10, text(9, 20), 8))).await;
        assert_eq!((alone.cached_tokens, &alone.ids), (0, &short.ids));
        assert_eq!(alone.finished.reason, FinishReason::Length);
    });
}

#[test]
fn requests_that_generate_together_end_as_each_would_alone_also_where_a_context_is_full() {
    with_service(async |service| {
        let Phase::Ready(facts) = service.phase() else {
            panic!("it is loaded");
        };
        let room = facts.context_tokens;
        // Prompt and tokens that are asked for; the second has no room for them.
        let asked = [(20, 30), (room - 6, 30), (40, 3)];
        let submit = |owner: usize| {
            let (prompt, max_tokens) = asked[owner % asked.len()];
            let mut request = request(owner as u64, text(3, prompt as u32), max_tokens);
            request.logprobs = owner.is_multiple_of(2).then_some(2);
            service.submit(request).unwrap()
        };
        let together: Vec<_> = (0..asked.len()).map(submit).collect();
        let mut found = Vec::new();
        for events in together {
            found.push(answer(events).await);
        }
        for (i, found) in found.into_iter().enumerate() {
            // Of another owner, so that nothing of it is known.
            let alone = answer(submit(i + 2 * asked.len())).await;
            assert_eq!((alone.cached_tokens, &alone.ids), (0, &found.ids), "{i}");
            assert_eq!(alone.finished.reason, found.finished.reason);
            assert_eq!(found.finished.usage.completion_tokens, found.ids.len());
        }
    });
}

#[test]
fn the_next_turn_of_a_conversation_costs_its_rest_also_after_others_and_for_nobody_else() {
    with_service(async |service| {
        let submit = |request| service.submit(request).unwrap();
        let prompt = text(1, 120);
        let first = answer(submit(request(1, prompt.clone(), 5))).await;
        assert_eq!(first.cached_tokens, 0);
        for owner in 2..6 {
            answer(submit(request(owner, text(owner as u32, 60), 3))).await;
        }
        let next = [&prompt[..], &first.ids, &[3, 4, 5]].concat();
        let second = answer(submit(request(1, next.clone(), 5))).await;
        // The last token was told, and never fed.
        assert_eq!(second.cached_tokens, prompt.len() + 4);
        assert_eq!(second.finished.usage.cached_tokens, prompt.len() + 4);
        let other = answer(submit(request(7, next, 5))).await;
        assert_eq!((other.cached_tokens, other.ids), (0, second.ids));
    });
}
