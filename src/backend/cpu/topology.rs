//! Which cores this process may use: physical cores, affinity mask, cgroup quota.

use std::collections::BTreeSet;
use std::fs;

/// One logical CPU of each physical core that the affinity mask allows, at most as many as the
/// cgroup's CPU quota pays for; never empty.
///
/// Two hyper-threads of a core share its vector units and caches, so a second one gains nothing.
pub fn usable_cores() -> Vec<usize> {
    let mut seen = BTreeSet::new();
    let mut cores: Vec<usize> = allowed_cpus()
        .into_iter()
        .filter(|&cpu| seen.insert(first_sibling(cpu)))
        .collect();
    if let Some(quota) = cgroup_quota_cores() {
        cores.truncate(quota.max(1));
    }
    if cores.is_empty() {
        cores.push(0);
    }
    cores
}

/// Ties the calling thread to one logical CPU. Failing to is harmless: it runs elsewhere.
pub fn pin_current_thread(cpu: usize) {
    // SAFETY: a zeroed `cpu_set_t` is an empty set, and `CPU_SET` ignores numbers beyond it.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

fn allowed_cpus() -> Vec<usize> {
    // SAFETY: the kernel writes at most the size it is given; `CPU_ISSET` stays below CPU_SETSIZE.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            let n = std::thread::available_parallelism().map_or(1, usize::from);
            return (0..n).collect();
        }
        (0..libc::CPU_SETSIZE as usize)
            .filter(|&cpu| libc::CPU_ISSET(cpu, &set))
            .collect()
    }
}

/// The lowest logical CPU on the same physical core; `cpu` itself where the system doesn't say.
fn first_sibling(cpu: usize) -> usize {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    fs::read_to_string(path)
        .ok()
        .and_then(|list| {
            let end = list.find([',', '-', '\n']).unwrap_or(list.len());
            list[..end].parse().ok()
        })
        .unwrap_or(cpu)
}

/// Whole cores that the cgroup's bandwidth limit allows, rounded up.
fn cgroup_quota_cores() -> Option<usize> {
    let v2 = fs::read_to_string("/sys/fs/cgroup/cpu.max").ok();
    let v1 = || {
        let quota = fs::read_to_string("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").ok()?;
        let period = fs::read_to_string("/sys/fs/cgroup/cpu/cpu.cfs_period_us").ok()?;
        Some(format!("{} {}", quota.trim(), period.trim()))
    };
    parse_quota(&v2.or_else(v1)?)
}

/// Parses `quota period` in microseconds; `max` or a negative quota is no limit.
fn parse_quota(text: &str) -> Option<usize> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (i64, i64) = (quota.parse().ok()?, period.parse().ok()?);
    (quota > 0 && period > 0).then(|| (quota as usize).div_ceil(period as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_always_a_core() {
        assert!(!usable_cores().is_empty());
    }

    #[test]
    fn quotas_round_up_to_whole_cores() {
        assert_eq!(parse_quota("150000 100000\n"), Some(2));
        assert_eq!(parse_quota("50000 100000"), Some(1));
        assert_eq!(parse_quota("max 100000\n"), None);
        assert_eq!(parse_quota("-1 100000"), None);
    }
}
