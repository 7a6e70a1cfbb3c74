//! The CPU as this process may use it: affinity, quota and the vector state the OS grants.

use std::collections::BTreeSet;
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::root::Root;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CpuFacts {
    pub architecture: String,
    pub model_name: String,
    /// Of the whole machine.
    pub logical_cores: usize,
    /// Ids of the logical cores in the affinity mask.
    pub allowed_cpus: Vec<usize>,
    /// Of those, the first of each physical core: where one worker per core belongs.
    pub physical_core_cpus: Vec<usize>,
    /// CPU time per wall time the control group grants; absent if unlimited.
    pub quota_cores: Option<f64>,
    pub l2_bytes: u64,
    /// All L3 slices of the machine together.
    pub l3_bytes: u64,
    pub features: Vec<CpuFeature>,
}

/// One instruction set extension.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFeature {
    pub name: String,
    /// The processor has it (the cpuid flag).
    pub present: bool,
    /// The processor has it and the OS saves its registers, so that it can be executed.
    pub usable: bool,
}

impl CpuFacts {
    pub(super) fn read(root: &Root) -> Self {
        let logical_cores = root.numbered(CPUS, "cpu").len();
        let allowed_cpus = affinity();
        Self {
            architecture: std::env::consts::ARCH.to_string(),
            model_name: model_name(root),
            logical_cores: logical_cores.max(allowed_cpus.len()),
            physical_core_cpus: first_siblings(root, &allowed_cpus),
            allowed_cpus,
            quota_cores: quota(root),
            l2_bytes: cache_bytes(root, 2),
            l3_bytes: cache_bytes(root, 3),
            features: features(),
        }
    }

    pub fn usable(&self, feature: &str) -> bool {
        self.features.iter().any(|f| f.usable && f.name == feature)
    }

    /// Threads that can make progress at once: physical cores allowed, within the quota.
    pub fn usable_cores(&self) -> usize {
        let quota = self
            .quota_cores
            .map_or(usize::MAX, |cores| cores.ceil() as usize);
        self.physical_core_cpus.len().min(quota).max(1)
    }
}

const CPUS: &str = "sys/devices/system/cpu";

fn model_name(root: &Root) -> String {
    root.field("proc/cpuinfo", "model name")
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| format!("unnamed {} processor", std::env::consts::ARCH))
}

#[cfg(target_os = "linux")]
fn affinity() -> Vec<usize> {
    // SAFETY: an all-zero cpu_set_t is the empty set; the kernel writes at most its size.
    let (set, rc) = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let rc = libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set);
        (set, rc)
    };
    if rc != 0 {
        return any_cores();
    }
    (0..libc::CPU_SETSIZE as usize)
        // SAFETY: the index is below CPU_SETSIZE.
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .collect()
}

#[cfg(not(target_os = "linux"))]
fn affinity() -> Vec<usize> {
    any_cores()
}

/// Ids 0..n where the mask cannot be asked for (it is also refused above 1,024 cores).
fn any_cores() -> Vec<usize> {
    (0..std::thread::available_parallelism().map_or(1, |n| n.get())).collect()
}

fn first_siblings(root: &Root, cpus: &[usize]) -> Vec<usize> {
    let mut seen = BTreeSet::new();
    let siblings = |cpu: usize| {
        root.text(format!("{CPUS}/cpu{cpu}/topology/thread_siblings_list"))
            .unwrap_or_else(|| cpu.to_string())
    };
    cpus.iter()
        .copied()
        .filter(|&cpu| seen.insert(siblings(cpu)))
        .collect()
}

/// Each cache once, however many cores share it.
fn cache_bytes(root: &Root, level: u64) -> u64 {
    let mut seen = BTreeSet::new();
    let mut total = 0;
    for cpu in root.numbered(CPUS, "cpu") {
        let folder = format!("{CPUS}/cpu{cpu}/cache");
        for index in root.numbered(&folder, "index") {
            let path = |file: &str| format!("{folder}/index{index}/{file}");
            if root.number(path("level")) != Some(level) {
                continue;
            }
            let sharers = root.text(path("shared_cpu_list")).unwrap_or_default();
            let size = root.text(path("size")).unwrap_or_default();
            let kib: Option<u64> = size.strip_suffix('K').and_then(|n| n.parse().ok());
            if let Some(kib) = kib
                && seen.insert(sharers)
            {
                total += kib * 1024;
            }
        }
    }
    total
}

/// The tightest quota over period of the control groups this process is in.
fn quota(root: &Root) -> Option<f64> {
    let v2 = root.cgroup_v2().into_iter().filter_map(|group| {
        let text = root.text(group.join("cpu.max"))?;
        let (quota, period) = text.split_once(' ')?;
        Some((quota.parse().ok()?, period.parse().ok()?))
    });
    let v1 = root.cgroup_v1("cpu").into_iter().filter_map(|group| {
        let number = |file| root.text(group.join(file))?.parse().ok();
        Some((number("cpu.cfs_quota_us")?, number("cpu.cfs_period_us")?))
    });
    v2.chain(v1)
        .filter(|&(quota, period): &(f64, f64)| quota > 0.0 && period > 0.0)
        .map(|(quota, period)| quota / period)
        .min_by(f64::total_cmp)
}

#[cfg(not(target_arch = "x86_64"))]
fn features() -> Vec<CpuFeature> {
    Vec::new()
}

#[cfg(target_arch = "x86_64")]
fn features() -> Vec<CpuFeature> {
    x86::features()
}

/// Whether this process may use AMX tiles with bytes; the first call asks the system for them.
#[cfg(target_arch = "x86_64")]
pub fn has_amx() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let features = features();
        let usable = |name| features.iter().any(|f| f.usable && f.name == name);
        usable("amx-tile") && usable("amx-int8")
    })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    use super::CpuFeature;

    /// Register state an extension needs the OS to save, as bits of XCR0.
    const NONE: u64 = 0;
    const AVX: u64 = 0b110;
    const AVX512: u64 = 0b1110_0110;
    const AMX: u64 = 0b11 << 17;

    /// Source: Intel SDM volume 1, chapter 13 (XCR0) and volume 2, CPUID leaves 1 and 7.
    pub fn features() -> Vec<CpuFeature> {
        let max_leaf = cpuid(0, 0)[0];
        let leaf1 = cpuid(1, 0);
        let leaf7 = if max_leaf >= 7 { cpuid(7, 0) } else { [0; 4] };
        let leaf7_1 = if leaf7[0] >= 1 { cpuid(7, 1) } else { [0; 4] };
        let (eax, ebx, ecx, edx) = (0, 1, 2, 3);
        let table = [
            ("sse4.2", leaf1[ecx], 20, NONE),
            ("popcnt", leaf1[ecx], 23, NONE),
            ("avx", leaf1[ecx], 28, AVX),
            ("f16c", leaf1[ecx], 29, AVX),
            ("fma", leaf1[ecx], 12, AVX),
            ("avx2", leaf7[ebx], 5, AVX),
            ("avx-vnni", leaf7_1[eax], 4, AVX),
            ("avx512f", leaf7[ebx], 16, AVX512),
            ("avx512bw", leaf7[ebx], 30, AVX512),
            ("avx512dq", leaf7[ebx], 17, AVX512),
            ("avx512vl", leaf7[ebx], 31, AVX512),
            ("avx512-vbmi", leaf7[ecx], 1, AVX512),
            ("avx512-vnni", leaf7[ecx], 11, AVX512),
            ("avx512-bf16", leaf7_1[eax], 5, AVX512),
            ("avx512-fp16", leaf7[edx], 23, AVX512),
            ("amx-tile", leaf7[edx], 24, AMX),
            ("amx-int8", leaf7[edx], 25, AMX),
            ("amx-bf16", leaf7[edx], 22, AMX),
        ];
        let xcr0 = xcr0(leaf1[ecx]);
        let amx_granted = leaf7[edx] >> 24 & 1 == 1 && xcr0 & AMX == AMX && request_amx();
        table
            .into_iter()
            .map(|(name, register, bit, state)| {
                let present = register >> bit & 1 == 1;
                let granted = xcr0 & state == state && (state != AMX || amx_granted);
                CpuFeature {
                    name: name.to_string(),
                    present,
                    usable: present && granted,
                }
            })
            .collect()
    }

    #[allow(unused_unsafe)] // Safe to call only since Rust 1.94 or so.
    fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
        // SAFETY: every x86_64 processor has the instruction; unknown leaves return zeros.
        let r = unsafe {
            match subleaf {
                0 => __cpuid(leaf),
                _ => __cpuid_count(leaf, subleaf),
            }
        };
        [r.eax, r.ebx, r.ecx, r.edx]
    }

    /// The register states the OS saves on a context switch; 0 if it does not use XSAVE.
    fn xcr0(leaf1_ecx: u32) -> u64 {
        let osxsave = leaf1_ecx >> 27 & 1 == 1;
        if !osxsave {
            return 0;
        }
        // SAFETY: OSXSAVE says that the OS has enabled XGETBV.
        unsafe { read_xcr0() }
    }

    #[target_feature(enable = "xsave")]
    fn read_xcr0() -> u64 {
        // SAFETY: register 0 always exists where the instruction does.
        unsafe { _xgetbv(0) }
    }

    /// Linux hands out the 8 KiB of tile registers only to processes that ask.
    #[cfg(target_os = "linux")]
    fn request_amx() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        // SAFETY: takes two integers, touches no memory of ours.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_PERM,
                XFEATURE_XTILEDATA,
            )
        };
        rc == 0
    }

    #[cfg(not(target_os = "linux"))]
    fn request_amx() -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::root::tree;
    use super::*;

    #[test]
    fn usable_features_agree_with_the_standard_librarys_detection() {
        #[cfg(target_arch = "x86_64")]
        {
            let facts = CpuFacts::read(&Root::system());
            assert_eq!(facts.usable("avx2"), is_x86_feature_detected!("avx2"));
            assert_eq!(facts.usable("fma"), is_x86_feature_detected!("fma"));
            assert_eq!(facts.usable("avx512f"), is_x86_feature_detected!("avx512f"));
            assert_eq!(
                facts.usable("avx512-vnni"),
                is_x86_feature_detected!("avx512vnni")
            );
            assert!(facts.features.iter().all(|f| f.present || !f.usable));
        }
    }

    #[test]
    fn at_least_one_core_is_usable() {
        let facts = CpuFacts::read(&Root::system());
        assert!(!facts.allowed_cpus.is_empty());
        assert!((1..=facts.logical_cores).contains(&facts.usable_cores()));
    }

    #[test]
    fn the_tightest_quota_up_the_v2_tree_counts() {
        let dir = tree(&[
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/b/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/a/cpu.max", "150000 100000\n"),
        ]);
        assert_eq!(quota(&Root::at(dir.path())), Some(1.5));
    }

    /// Whichever of the groups has it.
    #[test]
    fn of_several_quotas_the_tightest_counts() {
        for (own, parent, top, expected) in [
            ("300000 100000", "150000 100000", "400000 100000", 1.5),
            ("150000 100000", "300000 100000", "400000 100000", 1.5),
            ("300000 100000", "400000 100000", "50000 50000", 1.0),
            // A quota counts by its period.
            ("300000 200000", "200000 100000", "max 100000", 1.5),
        ] {
            let v2 = tree(&[
                ("proc/self/cgroup", "0::/a/b\n"),
                ("sys/fs/cgroup/a/b/cpu.max", own),
                ("sys/fs/cgroup/a/cpu.max", parent),
                ("sys/fs/cgroup/cpu.max", top),
            ]);
            assert_eq!(quota(&Root::at(v2.path())), Some(expected));
            let v1_file = |group: &str, text: &str| {
                let (quota, period) = text.split_once(' ').unwrap();
                let quota = if quota == "max" { "-1" } else { quota };
                let path = |file: &str| format!("sys/fs/cgroup/cpu/{group}cpu.cfs_{file}_us");
                [
                    (path("quota"), quota.to_string()),
                    (path("period"), period.to_string()),
                ]
            };
            let files = [
                v1_file("a/b/", own),
                v1_file("a/", parent),
                v1_file("", top),
            ]
            .concat();
            let mut files: Vec<(&str, &str)> = files.iter().map(|(p, t)| (&**p, &**t)).collect();
            files.push(("proc/self/cgroup", "3:cpu:/a/b\n"));
            assert_eq!(quota(&Root::at(tree(&files).path())), Some(expected));
        }
    }

    #[test]
    fn a_v1_quota_of_minus_one_is_unlimited() {
        let dir = tree(&[
            ("proc/self/cgroup", "4:cpu,cpuacct:/\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
        ]);
        assert_eq!(quota(&Root::at(dir.path())), None);
        fs::write(
            dir.path().join("sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
            "250000",
        )
        .unwrap();
        assert_eq!(quota(&Root::at(dir.path())), Some(2.5));
    }

    #[test]
    fn smt_siblings_are_one_core_and_a_shared_cache_counts_once() {
        let cpu = |n: usize, file: &str| format!("{CPUS}/cpu{n}/{file}");
        let mut files = Vec::new();
        for n in 0..4 {
            let siblings = if n % 2 == 0 { "0,2" } else { "1,3" };
            files.push((cpu(n, "topology/thread_siblings_list"), siblings));
            files.push((cpu(n, "cache/index3/level"), "3"));
            files.push((cpu(n, "cache/index3/size"), "32768K"));
            files.push((cpu(n, "cache/index3/shared_cpu_list"), "0-3"));
        }
        let files: Vec<(&str, &str)> = files.iter().map(|(p, t)| (p.as_str(), *t)).collect();
        let dir = tree(&files);
        let root = Root::at(dir.path());
        assert_eq!(first_siblings(&root, &[0, 1, 2, 3]), [0, 1]);
        assert_eq!(first_siblings(&root, &[2, 0]), [2]);
        assert_eq!(cache_bytes(&root, 3), 32 << 20);
    }
}
