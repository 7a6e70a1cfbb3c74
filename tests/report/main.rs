//! A report from records to files: what is written, what it says, and what it refuses.

mod fixture;

use std::fs;

use moectl::hardware::{CpuFacts, CpuFeature, DramProbe, HardwareBody, Rate};
use moectl::report::record::{Continuation, RunBody, Settings, Tier};
use moectl::report::verdict::Outcome;
use moectl::report::{ReportError, ReportInputs, Rule, Run, charts, doctor, write_report};

const CONTEXTS: [usize; 4] = [4096, 8192, 32_768, 131_072];

fn two_runs() -> ReportInputs {
    ReportInputs {
        title: "LRU against static".to_string(),
        runs: vec![
            fixture::run("static", &CONTEXTS, 1.0, 1),
            fixture::run("lru", &CONTEXTS, 1.2, 2),
        ],
        router: Some(fixture::picks(8, 64, 16, 3)),
        ..ReportInputs::default()
    }
}

#[test]
fn a_report_writes_documents_tables_and_every_chart_twice() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("new/folder");
    let files = write_report(&two_runs(), &folder).unwrap();
    let mut names: Vec<&str> = files
        .iter()
        .map(|f| f.file_name().unwrap().to_str().unwrap())
        .collect();
    names.sort_unstable();
    let charts = [
        "compare",
        "heatmap",
        "latency",
        "memory",
        "prediction",
        "resources",
        "throughput",
    ];
    let mut expected: Vec<String> = charts
        .iter()
        .flat_map(|name| [format!("{name}.png"), format!("{name}.svg")])
        .chain(
            [
                "report.html",
                "report.md",
                "samples.csv",
                "summary.csv",
                "monitor.csv",
            ]
            .map(String::from),
        )
        .collect();
    expected.sort_unstable();
    assert_eq!(names, expected);
    for file in &files {
        let bytes = fs::read(file).unwrap();
        assert!(bytes.len() > 500, "{}", file.display());
        if file.extension().unwrap() == "png" {
            assert!(bytes.starts_with(b"\x89PNG\r\n"));
        }
    }
}

#[test]
fn the_html_needs_no_other_file() {
    let inputs = two_runs();
    let html = moectl::report::html::render(&inputs, &inputs.charts());
    for outside in ["src=\"", "href=", "@import", "url(http"] {
        assert!(!html.contains(outside), "{outside}");
    }
    assert_eq!(html.matches("<svg ").count(), inputs.charts().len());
    assert!(html.contains("itl_<wbr>ms_<wbr>p99"));
}

#[test]
fn the_markdown_holds_medians_intervals_ratios_and_formulas() {
    let inputs = two_runs();
    let text = moectl::report::markdown::render(&inputs, &[]);
    assert!(
        text.contains("tpot_ms = (e2e_ms - ttft_ms) / (generated_tokens - 1)"),
        "{text}"
    );
    assert!(
        text.contains("lru against static (ratio = lru / static)"),
        "{text}"
    );
    assert!(text.contains("apart") && text.contains("overlap"));
    let row = text.lines().find(|l| l.starts_with("| static | ")).unwrap();
    assert!(row.contains('[') && row.contains(']'), "{row}");
    for line in text.lines().filter(|l| l.starts_with('|')) {
        assert!(line.ends_with('|'), "{line}");
    }
}

#[test]
fn samples_csv_has_one_row_per_sample_and_summary_csv_one_per_metric() {
    let inputs = two_runs();
    let samples = moectl::report::tables::samples(&inputs.runs).unwrap();
    let mut reader = csv::Reader::from_reader(samples.as_slice());
    let metrics: Vec<String> = reader
        .records()
        .map(|r| r.unwrap()[3].to_string())
        .collect();
    let of = |name: &str| metrics.iter().filter(|m| *m == name).count();
    assert_eq!(of("itl_ms"), 2 * CONTEXTS.len() * 10 * 127);
    assert_eq!(of("decode_tok_s"), 2 * CONTEXTS.len() * 10);

    let summary = moectl::report::tables::summary(&inputs.runs).unwrap();
    let mut reader = csv::Reader::from_reader(summary.as_slice());
    let column = reader
        .headers()
        .unwrap()
        .iter()
        .position(|h| h == "median")
        .unwrap();
    for row in reader.records() {
        let median: f64 = row.unwrap()[column].parse().unwrap();
        assert!(median > 0.0);
    }
}

#[test]
fn what_was_watched_and_how_far_the_plan_was_off_are_told() {
    let inputs = two_runs();
    let text = moectl::report::markdown::render(&inputs, &[]);
    for part in [
        "## During the run",
        "GPU power, W",
        "PCIe to the GPU, GB/s",
        "of VRAM planned, measured peak 12.9 GiB: the plan is +0.8% off",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    for absent in ["GPU memory busy", "PCIe from the GPU"] {
        assert!(!text.contains(absent), "{absent}");
    }
    let table = moectl::report::tables::monitor(&inputs.runs).unwrap();
    let mut reader = csv::Reader::from_reader(table.as_slice());
    let header = reader.headers().unwrap().clone();
    let column = |name: &str| header.iter().position(|h| h == name).unwrap();
    let rows: Vec<_> = reader.records().map(|row| row.unwrap()).collect();
    assert_eq!(rows.len(), 600);
    assert_eq!(&rows[0][column("pcie_rx_gb_s")], "22");
    assert_eq!(&rows[0][column("pcie_tx_gb_s")], "");
}

#[test]
fn synthetic_weights_are_named_in_every_output() {
    let mut inputs = two_runs();
    inputs.router.as_mut().unwrap().synthetic = true;
    for run in &mut inputs.runs {
        run.body.labels.synthetic = true;
    }
    let charts = inputs.charts();
    assert_eq!(charts.len(), 7);
    for chart in &charts {
        assert!(chart.svg.contains("SYNTHETIC WEIGHTS"), "{}", chart.name);
    }
    assert!(moectl::report::markdown::render(&inputs, &[]).contains("synthetic weights"));
    assert!(moectl::report::html::render(&inputs, &[]).contains("synthetic weights"));
    let summary = moectl::report::tables::summary(&inputs.runs).unwrap();
    assert!(String::from_utf8(summary).unwrap().contains(",true,"));
}

#[test]
fn nothing_to_report_is_an_error_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("out");
    let error = write_report(&ReportInputs::default(), &folder).unwrap_err();
    assert!(matches!(error, ReportError::Empty));
    assert!(!folder.exists());
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = write_report(&two_runs(), &file.join("out"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("file/out"), "{error}");
}

#[test]
fn a_run_record_survives_json_and_ignores_fields_of_later_versions() {
    let body = fixture::run("a", &CONTEXTS, 1.0, 1).body;
    let mut json = serde_json::to_value(&body).unwrap();
    json["a_field_of_tomorrow"] = 1.into();
    let back: RunBody = serde_json::from_value(json).unwrap();
    assert_eq!(back, body);
}

#[test]
fn what_decode_was_fed_is_told_and_a_record_without_it_was_sampled() {
    let mut inputs = two_runs();
    let settings = &mut inputs.runs[0].body.settings;
    let mut json = serde_json::to_value(&settings).unwrap();
    settings.continuation = Continuation::Text;
    assert!(
        json.as_object_mut()
            .unwrap()
            .remove("continuation")
            .is_some()
    );
    let before: Settings = serde_json::from_value(json).unwrap();
    assert_eq!(before.continuation, Continuation::Sampled);

    let text = moectl::report::markdown::render(&inputs, &[]);
    for line in [
        "static: decoded the text that follows the prompt",
        "lru: decoded what was sampled",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    // Fed text is the same whatever the model computes.
    assert!(!text.contains("the same tokens"), "{text}");
}

fn rule(threshold: f64) -> Rule {
    Rule {
        threshold,
        paired: false,
        allowed: Vec::new(),
    }
}

#[test]
fn a_slower_run_fails_and_noise_does_not() {
    let base = fixture::run("base", &CONTEXTS, 1.0, 1);
    let again = fixture::run("again", &CONTEXTS, 1.0, 7);
    let slower = fixture::run("slower", &CONTEXTS, 0.8, 2);
    let outcome = |base: &Run, new: &Run, threshold| rule(threshold).judge(base, new).outcome;
    assert_eq!(outcome(&base, &again, 0.05), Outcome::Pass);
    assert_eq!(outcome(&base, &slower, 0.5), Outcome::Pass);
    assert_eq!(outcome(&slower, &base, 0.05), Outcome::Pass);
    let verdict = rule(0.05).judge(&base, &slower);
    assert_eq!(verdict.outcome, Outcome::Fail);
    let decode = verdict.checks.iter().filter(|c| c.metric == "decode_tok_s");
    let decode: Vec<_> = decode.filter(|c| c.outcome == Outcome::Fail).collect();
    assert_eq!(decode.len(), CONTEXTS.len());
    let worse = |by: f64| (0.15..0.25).contains(&by);
    assert!(decode.iter().all(|c| worse(c.worse_by.unwrap())));
    let text = decode[0].to_string();
    assert!(text.starts_with("decode_tok_s at 4k context: "), "{text}");
}

#[test]
fn more_memory_fails() {
    let base = fixture::run("base", &CONTEXTS, 1.0, 1);
    let mut new = base.clone();
    new.body.memory.peak_rss_bytes *= 2;
    let verdict = rule(0.05).judge(&base, &new);
    let failed = verdict.checks.iter().filter(|c| c.outcome == Outcome::Fail);
    let failed: Vec<_> = failed.collect();
    assert_eq!(failed.len(), 1);
    assert_eq!(
        (failed[0].metric.as_str(), failed[0].worse_by),
        ("peak_rss_bytes", Some(1.0))
    );
}

#[test]
fn the_verdict_stands_on_top_and_results_before_charts() {
    let mut inputs = two_runs();
    inputs.runs[1] = fixture::run("slower", &CONTEXTS, 0.8, 2);
    inputs.verdicts = vec![rule(0.05).judge(&inputs.runs[0], &inputs.runs[1])];
    let html = moectl::report::html::render(&inputs, &inputs.charts());
    let at = |part: &str| html.find(part).unwrap_or_else(|| panic!("no {part}"));
    assert!(at("class=\"verdict fail\"") < at("<h2>Results"));
    assert!(at("<h2>Results") < at("<figure>"));
    assert!(at("<figure>") < at("<h2>Machine"));
}

#[test]
fn a_run_on_a_cpu_shows_no_vram_whatever_its_record_planned() {
    let mut run = fixture::run("cpu", &[512], 1.0, 1);
    run.body.labels.executed_on = "cpu".into();
    run.body.memory.peak_vram_bytes = None;
    let inputs = ReportInputs {
        runs: vec![run],
        ..ReportInputs::default()
    };
    let memory = inputs
        .charts()
        .into_iter()
        .find(|c| c.name == "memory")
        .unwrap();
    assert!(!memory.svg.contains(">VRAM<") && memory.svg.contains(">RAM<"));
    let text = moectl::report::markdown::render(&inputs, &[]);
    assert!(!text.contains("| VRAM"), "{text}");
}

#[test]
fn what_was_not_measured_alike_is_told_and_its_tokens_are_not_called_the_same() {
    let mut inputs = two_runs();
    inputs.runs[1].model = "another/model".into();
    let text = moectl::report::markdown::render(&inputs, &[]);
    assert!(text.contains("They were not measured alike:"), "{text}");
    assert!(!text.contains("the same tokens"), "{text}");
}

#[test]
fn the_prediction_error_is_relative_to_the_measured_median() {
    let run = fixture::run("base", &[4096], 1.0, 1);
    let error = run.body.contexts[0].prediction_error.unwrap();
    assert!((0.02..0.12).contains(&error), "{error}");
}

#[test]
fn charts_without_data_are_left_out() {
    let mut run = fixture::run("short", &[512], 1.0, 1);
    let body = &mut run.body;
    body.memory
        .components
        .retain(|c| c.tier == Tier::Disk && c.bytes == 0);
    body.monitor = None;
    body.contexts[0].prediction = None;
    for repetition in &mut body.contexts[0].repetitions {
        repetition.itl_ms.clear();
        repetition.decode_tok_s = 0.0;
    }
    let names: Vec<String> = charts::of_runs(&[run])
        .into_iter()
        .map(|c| c.name)
        .collect();
    assert_eq!(names, ["throughput"]);
    assert!(charts::heatmap(&fixture::picks(0, 0, 0, 1)).is_none());
}

#[test]
fn every_label_stays_inside_its_drawing() {
    let mut inputs = two_runs();
    inputs.runs[1].name = "a very long name that nobody should give to a run".repeat(3);
    inputs.runs[1].model = "organisation/model-of-a-very-long-name".repeat(8);
    for chart in inputs.charts() {
        let options = resvg::usvg::Options {
            fontdb: moectl::report::font::database(),
            ..Default::default()
        };
        let tree = resvg::usvg::Tree::from_str(&chart.svg, &options).unwrap();
        let drawn = tree.root().abs_bounding_box();
        let size = tree.size();
        assert!(drawn.left() >= 0.0 && drawn.top() >= 0.0, "{}", chart.name);
        assert!(
            drawn.right() <= size.width() + 0.5,
            "{}: {drawn:?}",
            chart.name
        );
        assert!(
            drawn.bottom() <= size.height() + 0.5,
            "{}: {drawn:?}",
            chart.name
        );
    }
}

#[test]
fn doctor_warns_of_what_costs_speed_and_says_the_way_out() {
    let mut hardware = fixture::run("a", &[512], 1.0, 1).body.hardware;
    let feature = |name: &str, present, usable| CpuFeature {
        name: name.to_string(),
        present,
        usable,
    };
    hardware.cpu = CpuFacts {
        architecture: "x86_64".to_string(),
        features: vec![
            feature("avx2", true, true),
            feature("fma", true, true),
            feature("amx-tile", true, false),
        ],
        quota_cores: Some(1.5),
        ..hardware.cpu
    };
    hardware.memory.cgroup_limit_bytes = Some(8 << 30);
    hardware.gpu.devices.clear();
    hardware.gpu.none_because = Some("no NVIDIA driver is installed".to_string());
    let rate = |median_gb_s| Rate {
        median_gb_s,
        best_gb_s: median_gb_s,
        ..Rate::default()
    };
    hardware.dram = Some(DramProbe {
        buffer_bytes: 1 << 28,
        threads: 2,
        all_cores: rate(30.0),
        one_core: rate(15.0),
        in_cache: rate(200.0),
    });
    let text = doctor::doctor_report(&hardware);
    for expected in [
        "amx-tile but the system does not grant it",
        "no AVX-512 VNNI",
        "grants 1.5 of 8 cores",
        "--threads 2",
        "8.00 GiB of RAM cannot hold",
        "gpu           none: no NVIDIA driver is installed",
        "no GPU: everything runs on the CPU",
        "dram read     30.0 GB/s",
    ] {
        assert!(text.contains(expected), "{expected}\n{text}");
    }
}

#[test]
fn this_machine_can_be_described_and_survives_json() {
    let hardware = HardwareBody::detect();
    let json = serde_json::to_string(&hardware).unwrap();
    assert_eq!(
        serde_json::from_str::<HardwareBody>(&json).unwrap(),
        hardware
    );
    assert!(doctor::doctor_report(&hardware).contains("ram"));
}
