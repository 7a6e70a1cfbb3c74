//! The cores that this process may use, and which of them are the fast ones.

use std::collections::BTreeSet;

use super::root::Root;

/// Two kinds, whatever their maker calls them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CoreKind {
    Performance,
    Efficiency,
}

/// One physical core, by its first logical CPU that this process may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Core {
    pub cpu: usize,
    pub kind: CoreKind,
}

pub(super) const CPUS: &str = "sys/devices/system/cpu";

/// A core with less than this share of the largest capacity or frequency is an efficiency core. Favoured
/// cores of one kind differ by some percent.
const PERFORMANCE_SHARE: f64 = 0.75;

/// One CPU of each physical core that the affinity mask allows, the performance cores first, at most as
/// many as the control groups' CPU quota pays for; never empty.
///
/// Two hyper-threads of a core share its vector units and caches, so a second one gains nothing.
pub fn usable() -> Vec<Core> {
    let root = Root::system();
    let mut cores = physical(&root, &allowed());
    if let Some(quota) = quota(&root) {
        cores.truncate((quota.ceil() as usize).max(1));
    }
    if cores.is_empty() {
        cores.push(Core {
            cpu: 0,
            kind: CoreKind::Performance,
        });
    }
    cores
}

/// The first of each physical core's logical CPUs, performance cores first, else in the order of `cpus`.
pub(super) fn physical(root: &Root, cpus: &[usize]) -> Vec<Core> {
    let mut seen = BTreeSet::new();
    let siblings = |cpu: usize| {
        root.text(format!("{CPUS}/cpu{cpu}/topology/thread_siblings_list"))
            .unwrap_or_else(|| cpu.to_string())
    };
    let is_performance = performance(root);
    let mut cores: Vec<Core> = (cpus.iter().copied())
        .filter(|&cpu| seen.insert(siblings(cpu)))
        .map(|cpu| Core {
            cpu,
            kind: match is_performance(cpu) {
                true => CoreKind::Performance,
                false => CoreKind::Efficiency,
            },
        })
        .collect();
    cores.sort_by_key(|core| core.kind);
    cores
}

/// Whether a CPU is of a performance core: by the lists of Intel's PMUs, else by the capacities that the
/// scheduler knows, else by the highest frequencies. All are where nothing tells.
fn performance(root: &Root) -> impl Fn(usize) -> bool {
    let listed = |pmu: &str| root.text(format!("sys/devices/{pmu}/cpus"));
    let listed = listed("cpu_core").zip(listed("cpu_atom"));
    let listed = listed.map(|(performance, _)| parse_list(&performance));
    let all = root.numbered(CPUS, "cpu");
    let of_all = |file: &str| -> Vec<(usize, u64)> {
        let figure = |&cpu: &usize| Some((cpu, root.number(format!("{CPUS}/cpu{cpu}/{file}"))?));
        all.iter().filter_map(figure).collect()
    };
    let spread = |figures: &[(usize, u64)]| {
        let values = || figures.iter().map(|&(_, value)| value);
        values().min() != values().max()
    };
    let figures = Some(of_all("cpu_capacity"))
        .filter(|figures| spread(figures))
        .unwrap_or_else(|| of_all("cpufreq/cpuinfo_max_freq"));
    let largest = figures.iter().map(|&(_, value)| value).max().unwrap_or(0);
    move |cpu| match &listed {
        Some(performance) => performance.contains(&cpu),
        None => {
            let figure = figures.iter().find(|&&(of, _)| of == cpu);
            figure.is_none_or(|&(_, value)| value as f64 >= PERFORMANCE_SHARE * largest as f64)
        }
    }
}

/// CPUs as the kernel lists them: `0-11,16`.
fn parse_list(text: &str) -> BTreeSet<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse().ok()?..=last.trim().parse::<usize>().ok()?)
    };
    text.split(',').filter_map(range).flatten().collect()
}

/// Logical CPUs in the affinity mask of this process.
#[cfg(target_os = "linux")]
pub(super) fn allowed() -> Vec<usize> {
    // SAFETY: an all-zero cpu_set_t is the empty set; the kernel writes at most its size.
    let (set, rc) = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let rc = libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set);
        (set, rc)
    };
    if rc != 0 {
        return any();
    }
    (0..libc::CPU_SETSIZE as usize)
        // SAFETY: the index is below CPU_SETSIZE.
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .collect()
}

#[cfg(not(target_os = "linux"))]
pub(super) fn allowed() -> Vec<usize> {
    any()
}

/// Ids 0..n where the mask cannot be asked for (it is also refused above 1,024 cores).
fn any() -> Vec<usize> {
    (0..std::thread::available_parallelism().map_or(1, |n| n.get())).collect()
}

/// The tightest quota over period of the control groups this process is in.
pub(super) fn quota(root: &Root) -> Option<f64> {
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::root::tree;
    use super::*;

    /// The cores of a machine in tests/data/topologies, whose files are lines of `path: text`.
    fn recorded(text: &str) -> Vec<Core> {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let files: Vec<(&str, &str)> = lines.map(|line| line.split_once(": ").unwrap()).collect();
        let dir = tree(&files);
        let root = Root::at(dir.path());
        physical(&root, &root.numbered(CPUS, "cpu"))
    }

    fn cpus(cores: &[Core], kind: CoreKind) -> Vec<usize> {
        let of_kind = cores.iter().filter(|core| core.kind == kind);
        of_kind.map(|core| core.cpu).collect()
    }

    #[test]
    fn performance_cores_come_first_on_recorded_machines() {
        let i7 = recorded(include_str!(
            "../../tests/data/topologies/core-i7-12700h.txt"
        ));
        assert_eq!(cpus(&i7, CoreKind::Performance), [0, 2, 4, 6, 8, 10]);
        assert_eq!(
            cpus(&i7, CoreKind::Efficiency),
            [12, 13, 14, 15, 16, 17, 18, 19]
        );
        let rk3588 = recorded(include_str!("../../tests/data/topologies/rk3588.txt"));
        let order: Vec<usize> = rk3588.iter().map(|core| core.cpu).collect();
        assert_eq!(order, [4, 5, 6, 7, 0, 1, 2, 3]);
        assert_eq!(cpus(&rk3588, CoreKind::Efficiency), [0, 1, 2, 3]);
        let ryzen = recorded(include_str!(
            "../../tests/data/topologies/ryzen-ai-9-hx-370.txt"
        ));
        assert_eq!(cpus(&ryzen, CoreKind::Performance), [0, 1, 2, 3]);
        assert_eq!(
            cpus(&ryzen, CoreKind::Efficiency),
            [4, 5, 6, 7, 8, 9, 10, 11]
        );
    }

    #[test]
    fn favoured_cores_and_those_nothing_is_known_of_are_of_one_kind() {
        let favoured = recorded(include_str!(
            "../../tests/data/topologies/favoured-cores.txt"
        ));
        assert_eq!(cpus(&favoured, CoreKind::Performance), [0, 1, 2, 3]);
        let dir = tree(&[("sys/devices/system/cpu/cpu1/online", "1")]);
        let cores = physical(&Root::at(dir.path()), &[0, 1]);
        assert_eq!(cpus(&cores, CoreKind::Performance), [0, 1]);
    }

    #[test]
    fn a_mask_of_efficiency_cores_leaves_only_those() {
        let text = include_str!("../../tests/data/topologies/core-i7-12700h.txt");
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let files: Vec<(&str, &str)> = lines.map(|line| line.split_once(": ").unwrap()).collect();
        let dir = tree(&files);
        let cores = physical(&Root::at(dir.path()), &[3, 12, 13]);
        assert_eq!(cpus(&cores, CoreKind::Performance), [3]);
        assert_eq!(cpus(&cores, CoreKind::Efficiency), [12, 13]);
    }

    #[test]
    fn there_is_always_a_core() {
        assert!(!usable().is_empty());
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
}
