//! RAM: what is there, what the control group leaves of it, nodes and huge pages.

use serde::{Deserialize, Serialize};

use super::root::Root;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryFacts {
    pub total_bytes: u64,
    /// What new allocations can get without swapping, the control group's limit included.
    pub available_bytes: u64,
    /// The smallest memory limit of the control groups this process is in.
    pub cgroup_limit_bytes: Option<u64>,
    pub swap_total_bytes: u64,
    /// `always`, `madvise` or `never`; absent where the kernel has none.
    pub transparent_huge_pages: Option<String>,
    pub huge_page_bytes: Option<u64>,
    /// Preallocated ones (`vm.nr_hugepages`), not the transparent kind.
    pub huge_pages_reserved: u64,
    pub numa_nodes: Vec<NumaNode>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NumaNode {
    pub id: usize,
    /// As the kernel lists them: `0-15,32-47`.
    pub cpus: String,
    pub total_bytes: u64,
}

impl MemoryFacts {
    /// Of this machine, now.
    pub fn detect() -> Self {
        Self::read(&Root::system())
    }

    pub(super) fn read(root: &Root) -> Self {
        let meminfo = |key| root.field_bytes("proc/meminfo", key);
        let (total_bytes, free_bytes, swap_total_bytes) =
            match (meminfo("MemTotal"), meminfo("MemAvailable")) {
                (Some(total), Some(free)) => (total, free, meminfo("SwapTotal").unwrap_or(0)),
                _ => from_sysinfo(),
            };
        let groups = cgroups(root);
        // "No limit" is `max` in version 2 and a huge number in version 1; neither is below the RAM.
        let limited = || (groups.iter()).filter(|group| group.limit_bytes < total_bytes);
        let cgroup_limit_bytes = limited().map(|group| group.limit_bytes).min();
        let left = limited().map(|group| group.limit_bytes.saturating_sub(group.used_bytes));
        let left_in_group = left.min().unwrap_or(u64::MAX);
        Self {
            total_bytes,
            available_bytes: free_bytes.min(left_in_group),
            cgroup_limit_bytes,
            swap_total_bytes,
            transparent_huge_pages: root
                .text("sys/kernel/mm/transparent_hugepage/enabled")
                .and_then(|modes| Some(modes.split_once('[')?.1.split_once(']')?.0.to_string())),
            huge_page_bytes: meminfo("Hugepagesize"),
            huge_pages_reserved: root
                .field("proc/meminfo", "HugePages_Total")
                .and_then(|n| n.parse().ok())
                .unwrap_or(0),
            numa_nodes: numa_nodes(root),
        }
    }

    /// RAM this process may ever hold: the machine's or its control group's, the smaller.
    pub fn usable_total_bytes(&self) -> u64 {
        self.total_bytes
            .min(self.cgroup_limit_bytes.unwrap_or(u64::MAX))
    }
}

fn from_sysinfo() -> (u64, u64, u64) {
    let Ok(mut system) = sysinfo::System::new() else {
        return (0, 0, 0);
    };
    system.refresh_memory();
    (
        system.total_memory(),
        system.available_memory(),
        system.total_swap(),
    )
}

/// One of the control groups this process is in.
struct Cgroup {
    limit_bytes: u64,
    /// What counts against the limit, less the page cache, which gives way; of all processes in it.
    used_bytes: u64,
}

fn cgroups(root: &Root) -> Vec<Cgroup> {
    let v2 = ["memory.max", "memory.current", "inactive_file"];
    let v1 = [
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ];
    let hierarchies = [(root.cgroup_v2(), v2), (root.cgroup_v1("memory"), v1)];
    let mut found = Vec::new();
    for (groups, [limit, usage, cache]) in hierarchies {
        let mut used_bytes = 0;
        for group in groups {
            // A group whose usage is not told uses what the one within it does, at least.
            if let Some(usage) = root.number(group.join(usage)) {
                let stat = root.text(group.join("memory.stat")).unwrap_or_default();
                let cache = stat.lines().find_map(|line| {
                    let (key, value) = line.split_once(' ')?;
                    (key == cache).then(|| value.parse().ok())?
                });
                used_bytes = usage.saturating_sub(cache.unwrap_or(0));
            }
            found.extend(root.number(group.join(limit)).map(|limit_bytes| Cgroup {
                limit_bytes,
                used_bytes,
            }));
        }
    }
    found
}

fn numa_nodes(root: &Root) -> Vec<NumaNode> {
    const FOLDER: &str = "sys/devices/system/node";
    root.numbered(FOLDER, "node")
        .into_iter()
        .map(|id| NumaNode {
            id,
            cpus: root
                .text(format!("{FOLDER}/node{id}/cpulist"))
                .unwrap_or_default(),
            total_bytes: root
                .field_bytes(
                    &format!("{FOLDER}/node{id}/meminfo"),
                    &format!("Node {id} MemTotal"),
                )
                .unwrap_or(0),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::root::tree;
    use super::*;

    const MEMINFO: &str = "MemTotal: 16000000 kB\nMemAvailable: 15000000 kB\nHugePages_Total: 4\n\
                           Hugepagesize: 2048 kB\n";

    #[test]
    fn a_v2_limit_of_a_parent_group_counts() {
        let dir = tree(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/user/job\n"),
            ("sys/fs/cgroup/user/job/memory.max", "max\n"),
            ("sys/fs/cgroup/user/memory.max", "8000000000\n"),
            ("sys/fs/cgroup/user/job/memory.current", "3000000000\n"),
            (
                "sys/fs/cgroup/user/job/memory.stat",
                "anon 1\ninactive_file 1000000000\n",
            ),
        ]);
        let facts = MemoryFacts::read(&Root::at(dir.path()));
        assert_eq!(facts.cgroup_limit_bytes, Some(8_000_000_000));
        assert_eq!(facts.available_bytes, 6_000_000_000);
        assert_eq!(facts.usable_total_bytes(), 8_000_000_000);
        assert_eq!(facts.huge_page_bytes, Some(2 << 20));
        assert_eq!(facts.huge_pages_reserved, 4);
    }

    /// A group's limit is for all of its processes, not only for those of the group within it.
    #[test]
    fn the_smallest_limit_is_told_and_the_group_with_least_left_says_what_is_available() {
        let facts = |own_limit: &str, parent_limit: &str, parent_used: &str| {
            let dir = tree(&[
                ("proc/meminfo", MEMINFO),
                ("proc/self/cgroup", "0::/user/job\n"),
                ("sys/fs/cgroup/user/job/memory.max", own_limit),
                ("sys/fs/cgroup/user/job/memory.current", "3000000000"),
                (
                    "sys/fs/cgroup/user/job/memory.stat",
                    "inactive_file 1000000000",
                ),
                ("sys/fs/cgroup/user/memory.max", parent_limit),
                ("sys/fs/cgroup/user/memory.current", parent_used),
                ("sys/fs/cgroup/user/memory.stat", "inactive_file 1500000000"),
            ]);
            let facts = MemoryFacts::read(&Root::at(dir.path()));
            (facts.cgroup_limit_bytes, facts.available_bytes)
        };
        let gb = 1_000_000_000;
        let roomy = "3000000000";
        assert_eq!(
            facts("4000000000", "8000000000", roomy),
            (Some(4 * gb), 2 * gb)
        );
        assert_eq!(
            facts("8000000000", "4000000000", roomy),
            (Some(4 * gb), 2_500_000_000)
        );
        // Other processes of the parent have taken most of it.
        let taken = "9000000000";
        assert_eq!(
            facts("4000000000", "8000000000", taken),
            (Some(4 * gb), 500_000_000)
        );
        assert_eq!(
            facts("max", "8000000000", taken),
            (Some(8 * gb), 500_000_000)
        );
    }

    /// `inactive_file` of version 1 is that of the group without those within it.
    #[test]
    fn the_page_cache_of_a_v1_group_is_that_of_all_its_groups() {
        let dir = tree(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "5:memory:/job\n"),
            (
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes",
                "4000000000",
            ),
            (
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes",
                "3000000000",
            ),
            (
                "sys/fs/cgroup/memory/job/memory.stat",
                "inactive_file 0\ntotal_inactive_file 1000000000\n",
            ),
        ]);
        let facts = MemoryFacts::read(&Root::at(dir.path()));
        assert_eq!(facts.available_bytes, 2_000_000_000);
    }

    #[test]
    fn a_v1_limit_is_found_at_the_mount_when_the_groups_path_is_hidden() {
        let dir = tree(&[
            ("proc/meminfo", MEMINFO),
            (
                "proc/self/cgroup",
                "9:cpu,cpuacct:/docker/ab\n5:memory:/docker/ab\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "4000000000\n"),
        ]);
        let facts = MemoryFacts::read(&Root::at(dir.path()));
        assert_eq!(facts.cgroup_limit_bytes, Some(4_000_000_000));
    }

    #[test]
    fn a_limit_above_the_ram_is_no_limit() {
        let dir = tree(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "5:memory:/\n"),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
        ]);
        let facts = MemoryFacts::read(&Root::at(dir.path()));
        assert_eq!(facts.cgroup_limit_bytes, None);
        assert_eq!(facts.available_bytes, 15_000_000 * 1024);
    }

    #[test]
    fn the_machine_of_this_test_has_memory() {
        let facts = MemoryFacts::read(&Root::system());
        assert!(facts.total_bytes > 0);
        assert!(facts.available_bytes <= facts.total_bytes);
    }
}
