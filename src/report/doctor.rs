//! What `moectl doctor` prints: the machine in plain words, and what stands in its way.

use std::fmt::Write;

use super::units;
use crate::hardware::{GpuFacts, GpuProbe, HardwareBody, Rate};

/// Size of the first model of the project, Qwen3-Next-80B in NF4, with its dense part.
const LARGE_MODEL_BYTES: u64 = 42_000_000_000;
/// A cached loop that is not at least this much faster says the loop was measured, not the DRAM.
const IN_CACHE_MARGIN: f64 = 1.5;

/// The whole report, for a terminal without colours.
pub fn doctor_report(hardware: &HardwareBody) -> String {
    let facts = facts(hardware);
    let widest = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut out = String::new();
    for (name, value) in &facts {
        let _ = writeln!(out, "{name:<widest$}  {value}");
    }
    let warnings = warnings(hardware);
    if warnings.is_empty() {
        out.push_str("\nnothing to warn of\n");
    }
    for warning in warnings {
        let _ = write!(out, "\nwarning: {warning}\n");
    }
    out
}

/// Named facts in reading order.
pub fn facts(hardware: &HardwareBody) -> Vec<(&'static str, String)> {
    let (cpu, memory) = (&hardware.cpu, &hardware.memory);
    let mut facts = vec![
        ("system", hardware.os.clone()),
        ("cpu", format!("{} ({})", cpu.model_name, cpu.architecture)),
        ("cores", cores(hardware)),
        (
            "caches",
            format!(
                "L2 {}, L3 {}",
                units::bytes(cpu.l2_bytes),
                units::bytes(cpu.l3_bytes)
            ),
        ),
        ("instructions", instructions(hardware)),
        ("ram", ram(hardware)),
    ];
    if memory.numa_nodes.len() > 1 {
        let nodes = memory.numa_nodes.iter().map(|node| {
            let size = units::bytes(node.total_bytes);
            format!("node {}: cpus {}, {size}", node.id, node.cpus)
        });
        facts.push(("numa", nodes.collect::<Vec<_>>().join("; ")));
    }
    facts.extend(huge_pages(hardware).map(|text| ("huge pages", text)));
    if let Some(dram) = &hardware.dram {
        let one = rate(&dram.one_core);
        facts.push((
            "dram read",
            format!("{} with {} threads", rate(&dram.all_cores), dram.threads),
        ));
        facts.push(("dram, 1 core", one));
    }
    for gpu in &hardware.gpu.devices {
        facts.push(("gpu", gpu_text(gpu)));
    }
    if let Some(reason) = &hardware.gpu.none_because {
        facts.push(("gpu", format!("none: {reason}")));
    }
    if let Some(driver) = &hardware.gpu.driver_version {
        let cuda = hardware.gpu.cuda_version.as_deref().unwrap_or("unknown");
        facts.push(("driver", format!("{driver}, CUDA up to {cuda}")));
    }
    if let Some(probe) = &hardware.cpu_experts {
        for batch in &probe.batches {
            facts.push((
                "cpu experts",
                format!(
                    "{} tokens: {}, {:.0} ± {:.0} GFLOP/s",
                    batch.tokens,
                    rate(&batch.weights),
                    batch.median_gflops,
                    batch.mad_gflops
                ),
            ));
        }
    }
    if let Some(probe) = &hardware.gpu_probe {
        facts.extend(measured(probe));
    }
    facts
}

/// A line for each figure of a measured GPU.
fn measured(probe: &GpuProbe) -> Vec<(&'static str, String)> {
    let mut lines = vec![(
        "gpu measured",
        format!(
            "{} with {}, {:.0} s",
            probe.name, probe.model, probe.seconds
        ),
    )];
    let rates = probe.rates().into_iter();
    lines.extend(rates.map(|(name, r)| ("", format!("{name}: {}", rate(r)))));
    lines.extend(probe.durations().into_iter().map(|(name, d)| {
        let (median, mad) = (d.median_us, d.mad_us);
        let text = format!(
            "{name}: {median:.1} ± {mad:.1} us median of {}",
            d.repetitions
        );
        ("", text)
    }));
    lines
}

/// What will cost speed or does not fit, each with the way out.
pub fn warnings(hardware: &HardwareBody) -> Vec<String> {
    let (cpu, memory) = (&hardware.cpu, &hardware.memory);
    let mut warnings = Vec::new();
    let masked: Vec<&str> = cpu
        .features
        .iter()
        .filter(|f| f.present && !f.usable)
        .map(|f| f.name.as_str())
        .collect();
    if !masked.is_empty() {
        warnings.push(format!(
            "the processor has {} but the system does not grant it; \
             a newer kernel or another virtual machine type would",
            masked.join(", ")
        ));
    }
    if cpu.architecture == "x86_64" {
        if !cpu.usable("avx2") || !cpu.usable("fma") {
            warnings.push(
                "no AVX2 and FMA: only the slow scalar kernels run here; use another machine"
                    .to_string(),
            );
        } else if !cpu.usable("avx512-vnni") {
            let (kernels, share) = match cpu.usable("avx-vnni") {
                true => ("AVX-VNNI", "three quarters"),
                false => ("AVX2", "three fifths"),
            };
            warnings.push(format!(
                "no AVX-512 VNNI: experts in RAM run on the {kernels} kernels, \
                 about {share} of the speed per core"
            ));
        }
    }
    let cores = cpu.physical_core_cpus.len();
    if let Some(quota) = cpu.quota_cores.filter(|&quota| quota < cores as f64) {
        warnings.push(format!(
            "the control group grants {quota:.1} of {cores} cores; \
             raise its cpu quota or run with --threads {}",
            cpu.usable_cores()
        ));
    }
    let usable = memory.usable_total_bytes();
    if usable < LARGE_MODEL_BYTES {
        warnings.push(format!(
            "{} of RAM cannot hold the experts of Qwen3-Next-80B ({}); \
             those beyond it would be read from disk at every use",
            units::bytes(usable),
            units::bytes(LARGE_MODEL_BYTES)
        ));
    } else if memory.available_bytes < LARGE_MODEL_BYTES {
        warnings.push(format!(
            "{} of RAM is free, Qwen3-Next-80B needs {}; close other programs first",
            units::bytes(memory.available_bytes),
            units::bytes(LARGE_MODEL_BYTES)
        ));
    }
    if memory.transparent_huge_pages.as_deref() == Some("never") {
        warnings.push(
            "transparent huge pages are off; \
             `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled` (as root) turns them on"
                .to_string(),
        );
    }
    match &hardware.dram {
        Some(dram) if dram.in_cache.median_gb_s < IN_CACHE_MARGIN * dram.all_cores.best_gb_s => {
            warnings.push(
                "reading the cache is not much faster than reading DRAM: \
                 the bandwidth above is a lower bound"
                    .to_string(),
            );
        }
        Some(dram) if dram.all_cores.mad_gb_s > 0.1 * dram.all_cores.median_gb_s => {
            warnings.push(
                "the DRAM bandwidth varied by more than a tenth; \
                 measure again while nothing else runs"
                    .to_string(),
            );
        }
        _ => {}
    }
    if hardware.gpu.devices.is_empty() {
        warnings.push(
            "no GPU: everything runs on the CPU; plans for a GPU can still be made with --vram"
                .to_string(),
        );
    }
    for gpu in &hardware.gpu.devices {
        if let (Some(now), Some(max)) = (gpu.pcie_width, gpu.pcie_width_max)
            && now < max
        {
            warnings.push(format!(
                "GPU {} is linked with {now} of {max} PCIe lanes; \
                 another slot or firmware setting may give it all",
                gpu.index
            ));
        }
    }
    warnings
}

fn cores(hardware: &HardwareBody) -> String {
    let cpu = &hardware.cpu;
    let quota = match cpu.quota_cores {
        Some(quota) => format!("quota {quota:.1}"),
        None => "no quota".to_string(),
    };
    let efficiency = match cpu.efficiency_core_cpus.len() {
        0 => String::new(),
        n => format!(", {n} of them efficiency cores"),
    };
    format!(
        "{} usable ({} logical in the machine, {} allowed on {} physical{efficiency}, {quota})",
        cpu.usable_cores(),
        cpu.logical_cores,
        cpu.allowed_cpus.len(),
        cpu.physical_core_cpus.len(),
    )
}

fn instructions(hardware: &HardwareBody) -> String {
    let usable = hardware.cpu.features.iter().filter(|f| f.usable);
    let names: Vec<&str> = usable.map(|f| f.name.as_str()).collect();
    match names.is_empty() {
        true => "none that moectl has kernels for".to_string(),
        false => names.join(" "),
    }
}

fn ram(hardware: &HardwareBody) -> String {
    let memory = &hardware.memory;
    let limit = match memory.cgroup_limit_bytes {
        Some(limit) => format!(", limited to {} by the control group", units::bytes(limit)),
        None => String::new(),
    };
    format!(
        "{} free of {}{limit}",
        units::bytes(memory.available_bytes),
        units::bytes(memory.total_bytes)
    )
}

/// `None` where the kernel has none, as on other systems than Linux.
fn huge_pages(hardware: &HardwareBody) -> Option<String> {
    let memory = &hardware.memory;
    let mode = memory.transparent_huge_pages.as_deref()?;
    let size = units::bytes(memory.huge_page_bytes?);
    let reserved = memory.huge_pages_reserved;
    Some(format!(
        "transparent: {mode}, {reserved} of {size} reserved"
    ))
}

fn rate(rate: &Rate) -> String {
    format!(
        "{:.1} GB/s best, {:.1} ± {:.1} median of {}",
        rate.best_gb_s, rate.median_gb_s, rate.mad_gb_s, rate.repetitions
    )
}

fn gpu_text(gpu: &GpuFacts) -> String {
    let mut parts = vec![format!("{}: {}", gpu.index, gpu.name)];
    if let Some(capability) = &gpu.compute_capability {
        parts.push(format!("compute {capability}"));
    }
    if let (Some(free), Some(total)) = (gpu.memory_free_bytes, gpu.memory_total_bytes) {
        parts.push(format!(
            "{} free of {}",
            units::bytes(free),
            units::bytes(total)
        ));
    }
    if let (Some(generation), Some(width)) = (gpu.pcie_generation_max, gpu.pcie_width) {
        parts.push(format!("PCIe {generation} x{width}"));
    }
    if let Some(watt) = gpu.power_limit_w {
        parts.push(format!("{watt:.0} W"));
    }
    parts.join(", ")
}
