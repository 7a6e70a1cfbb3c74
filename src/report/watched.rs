//! What the monitor saw, as a table: mean and peak of each quantity that the machine counts.

use super::content::{Block, Section, Table};
use super::{Run, units};
use crate::hardware::{MonitorRecord, Sample};

/// `None` if no run was watched.
pub fn section(runs: &[Run]) -> Option<Section> {
    let watched = |run| Some((run, run_monitor(run)?));
    let rows: Vec<Vec<String>> = runs
        .iter()
        .filter_map(watched)
        .flat_map(|(run, monitor)| rows(run, monitor))
        .collect();
    let text = "Mean and peak of the samples in monitor.csv, through warm-ups and repetitions; PCIe \
                rates are of some 20 ms at each sample, all processes together, and totals those \
                rates over time. What the machine does not count has no row.";
    let header = ["run", "quantity", "mean", "peak", "total"];
    let blocks = vec![
        Block::Text(text.to_string()),
        Table::block(2, &header, rows),
    ];
    runs.iter()
        .any(|run| run_monitor(run).is_some())
        .then(|| Section::new("During the run", blocks))
}

fn run_monitor(run: &Run) -> Option<&MonitorRecord> {
    run.body.monitor.as_ref().filter(|m| !m.samples.is_empty())
}

fn rows(run: &Run, monitor: &MonitorRecord) -> Vec<Vec<String>> {
    let bytes = |value: f64| units::bytes(value.round() as u64);
    let number = units::significant;
    let total = |gb_s| monitor.total_bytes(gb_s).map(units::bytes);
    let mut rows = Vec::new();
    let mut row = |name: &str,
                   value: fn(&Sample) -> Option<f64>,
                   show: &dyn Fn(f64) -> String,
                   total: Option<String>| {
        let values: Vec<f64> = monitor.samples.iter().filter_map(value).collect();
        if values.is_empty() && total.is_none() {
            return;
        }
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let peak = values.iter().copied().fold(0.0, f64::max);
        let shown = |value: f64| match values.is_empty() {
            true => "–".to_string(),
            false => show(value),
        };
        rows.push(vec![
            run.name.clone(),
            name.to_string(),
            shown(mean),
            shown(peak),
            total.unwrap_or_default(),
        ]);
    };
    row("CPU cores busy", |s| Some(s.cpu_cores), &number, None);
    row("RAM (RSS)", |s| Some(s.rss_bytes as f64), &bytes, None);
    row("GPU memory", |s| Some(s.vram_bytes? as f64), &bytes, None);
    let percent = |value: f64| format!("{value:.0}%");
    row(
        "GPU busy",
        |s| s.gpu_utilisation_percent.map(f64::from),
        &percent,
        None,
    );
    row(
        "GPU memory busy",
        |s| s.gpu_memory_utilisation_percent.map(f64::from),
        &percent,
        None,
    );
    let joule = monitor.gpu_energy_j.map(|j| format!("{} J", number(j)));
    row("GPU power, W", |s| s.gpu_power_w, &number, joule);
    row(
        "PCIe to the GPU, GB/s",
        |s| s.pcie_rx_gb_s,
        &number,
        total(|s| s.pcie_rx_gb_s),
    );
    row(
        "PCIe from the GPU, GB/s",
        |s| s.pcie_tx_gb_s,
        &number,
        total(|s| s.pcie_tx_gb_s),
    );
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::RunBody;

    fn run(monitor: Option<MonitorRecord>) -> Run {
        let body: RunBody = serde_json::from_value(serde_json::json!({
            "labels": {"synthetic": false, "executed_on": "cuda:0"},
            "hardware": crate::hardware::HardwareBody::detect(),
            "software": crate::report::record::SoftwareFacts::default(),
            "settings": crate::report::record::Settings::default(),
            "placement_sha256": null,
            "contexts": [],
            "memory": crate::report::record::MemoryRecord::default(),
        }))
        .unwrap();
        Run {
            name: "one".into(),
            model: String::new(),
            fingerprint: None,
            created: String::new(),
            body: RunBody { monitor, ..body },
        }
    }

    #[test]
    fn absent_counters_have_no_row_and_no_zero() {
        let sample = |power: Option<f64>| Sample {
            cpu_cores: 2.0,
            rss_bytes: 1 << 30,
            gpu_power_w: power,
            ..Sample::default()
        };
        let monitor = MonitorRecord {
            samples: vec![sample(Some(100.0)), sample(Some(300.0)), sample(None)],
            gpu_energy_j: Some(50.0),
            ..MonitorRecord::default()
        };
        let runs = [run(Some(monitor)), run(None)];
        let section = section(&runs).unwrap();
        let Block::Table(table) = &section.blocks[1] else {
            panic!("{section:?}");
        };
        let rows: Vec<&[String]> = table.rows.iter().map(|row| &row[1..]).collect();
        assert_eq!(
            rows,
            [
                ["CPU cores busy", "2.00", "2.00", ""],
                ["RAM (RSS)", "1.00 GiB", "1.00 GiB", ""],
                ["GPU power, W", "200", "300", "50.0 J"],
            ]
        );
        assert!(super::section(&runs[1..]).is_none());
    }
}
