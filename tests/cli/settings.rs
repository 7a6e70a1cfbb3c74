//! Where a setting comes from: flag, variable, ./moectl.toml, the user's config, default.

use serde_json::Value;

use crate::program::{Sandbox, finish, small_model};

const USER_CONFIG: &str = ".config/moectl/config.toml";

/// What `run --json` says it ran with, under the given variables.
#[track_caller]
fn run_record(sandbox: &Sandbox, flags: &[&str], variables: &[(&str, &str)]) -> Value {
    let args = [&["run", "--json", "-n", "1", "hello"], flags].concat();
    let mut command = sandbox.command(&args);
    finish(command.envs(variables.iter().copied())).ok().json()
}

#[test]
fn flags_win_over_variables_over_the_folder_over_the_user() {
    let sandbox = Sandbox::new();
    let model = small_model();
    let model = model.to_str().unwrap();
    sandbox.write(
        USER_CONFIG,
        format!("model = {model:?}\nseed = 4\nbackend = \"reference\"\n"),
    );
    let user = run_record(&sandbox, &[], &[]);
    assert_eq!(user["model"]["id"], model);
    assert_eq!(user["backend"], "reference");
    assert_eq!(user["seed"], 4);

    sandbox.write("moectl.toml", "seed = 3\n[run]\nbackend = \"cpu\"\n");
    let folder = run_record(&sandbox, &[], &[]);
    assert_eq!(folder["model"]["id"], model);
    assert_eq!(folder["backend"], "cpu");
    assert_eq!(folder["seed"], 3);

    let variables = [("MOECTL_SEED", "2"), ("MOECTL_BACKEND", "reference")];
    let variable = run_record(&sandbox, &[], &variables);
    assert_eq!(variable["model"]["id"], model);
    assert_eq!(variable["backend"], "reference");
    assert_eq!(variable["seed"], 2);

    let flag = run_record(&sandbox, &["--seed", "1", "--backend", "cpu"], &variables);
    assert_eq!(flag["backend"], "cpu");
    assert_eq!(flag["seed"], 1);
}

#[test]
fn the_model_variable_wins_over_the_settings_file() {
    let sandbox = Sandbox::new();
    sandbox.write("moectl.toml", "model = \"nowhere\"\n");
    let model = small_model();
    let model = model.to_str().unwrap();
    let record = run_record(&sandbox, &[], &[("MOECTL_MODEL", model)]);
    assert_eq!(record["model"]["id"], model);
}

#[test]
fn a_section_of_a_verb_wins_over_the_top_of_its_file() {
    let sandbox = Sandbox::new();
    let model = small_model();
    let settings = format!("model = {model:?}\nseed = 1\n\n[run]\nseed = 2\n");
    sandbox.write("moectl.toml", settings);
    assert_eq!(run_record(&sandbox, &[], &[])["seed"], 2);
}

#[test]
fn sampling_settings_reach_the_sampler() {
    let sandbox = Sandbox::new();
    let model = small_model();
    let settings = format!("model = {model:?}\n[run]\ntemperature = 0\nmax-tokens = 12\n");
    sandbox.write("moectl.toml", settings);
    let ids = |seed: &str| {
        let args = ["run", "--json", "--ignore-eos", "hello", "--seed", seed];
        sandbox.run_args(&args).ok().json()["token_ids"].clone()
    };
    // Greedy: no seed matters.
    assert_eq!(ids("1"), ids("2"));
    assert_eq!(ids("1").as_array().unwrap().len(), 12);
}

#[test]
fn a_bad_settings_file_is_named_with_the_setting() {
    let sandbox = Sandbox::new();
    for (content, parts) in [
        ("modle = \"x\"\n", ["moectl.toml", "`modle`"]),
        (
            "[run]\nshard = \"1/2\"\n",
            ["moectl.toml", "`shard` is no setting of run"],
        ),
        ("[fly]\nhigh = 1\n", ["moectl.toml", "[fly] is no verb"]),
        ("threads = \"many\"\n", ["moectl.toml", "--threads"]),
        ("[plan]\nkv = \"fp4\"\n", ["moectl.toml", "f16, int8, auto"]),
        ("seed = [1]\n", ["moectl.toml", "seed: is array, expected"]),
        ("seed = \n", ["moectl.toml", "not valid TOML"]),
    ] {
        sandbox.write("moectl.toml", content);
        sandbox.run("run hello").fails(1, &parts);
    }
    sandbox.write("moectl.toml", "");
    sandbox.write(USER_CONFIG, "nonsense = 1\n");
    sandbox
        .run("run hello")
        .fails(1, &[USER_CONFIG, "`nonsense`"]);
}

#[test]
fn a_bad_variable_is_a_usage_error() {
    let sandbox = Sandbox::new();
    let mut command = sandbox.command(&["run", "hello"]);
    finish(command.env("MOECTL_THREADS", "many")).fails(2, &["--threads", "many"]);
}
