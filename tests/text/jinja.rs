//! Templates against recorded renderings of Jinja2 as transformers sets it up.

use moectl::model::{ChatTemplate, TemplateInputs};

use crate::json;

#[test]
fn renderings_are_those_of_jinja2() {
    let recorded = json("tests/data/text/jinja.json");
    let context = recorded["context"].as_object().unwrap();
    let messages = context["messages"].as_array().unwrap();
    for case in recorded["cases"].as_array().unwrap() {
        let source = case["template"].as_str().unwrap();
        let inputs = TemplateInputs {
            variables: Some(context),
            add_generation_prompt: true,
            ..TemplateInputs::default()
        };
        let found = ChatTemplate::from_bytes(None, Some(source.as_bytes()))
            .and_then(|template| template.unwrap().render_with(messages, &inputs));
        match case["text"].as_str() {
            Some(expected) => assert_eq!(found.unwrap(), expected, "{source}"),
            None => assert!(found.is_err(), "{source}: {found:?}"),
        }
    }
}
