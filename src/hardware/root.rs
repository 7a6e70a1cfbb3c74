//! Files under `/proc` and `/sys`, read below a root that tests can replace.

use std::fs;
use std::path::{Path, PathBuf};

pub struct Root(PathBuf);

impl Root {
    pub fn system() -> Self {
        Self(PathBuf::from("/"))
    }

    #[cfg(test)]
    pub fn at(path: &Path) -> Self {
        Self(path.to_path_buf())
    }

    /// The trimmed text of a file, `None` if it cannot be read.
    pub fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let text = fs::read_to_string(self.0.join(path)).ok()?;
        Some(text.trim().to_string())
    }

    pub fn number(&self, path: impl AsRef<Path>) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// Numbers N for which `folder/<prefix>N` exists, ascending.
    pub fn numbered(&self, folder: &str, prefix: &str) -> Vec<usize> {
        let Ok(entries) = fs::read_dir(self.0.join(folder)) else {
            return Vec::new();
        };
        let mut numbers: Vec<usize> = entries
            .filter_map(|entry| {
                let name = entry.ok()?.file_name();
                name.to_str()?.strip_prefix(prefix)?.parse().ok()
            })
            .collect();
        numbers.sort_unstable();
        numbers
    }

    /// Value of `key` in a file of `key: value` or `key<tab>: value` lines.
    pub fn field(&self, path: &str, key: &str) -> Option<String> {
        let text = self.text(path)?;
        text.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == key).then(|| value.trim().to_string())
        })
    }

    /// A `key: N kB` field in bytes.
    pub fn field_bytes(&self, path: &str, key: &str) -> Option<u64> {
        let value = self.field(path, key)?;
        let kib: u64 = value.strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    }

    /// Folders of this process' version 2 control group and of its parents, its own first.
    pub fn cgroup_v2(&self) -> Vec<PathBuf> {
        self.cgroups(|controllers| controllers.is_empty(), "sys/fs/cgroup")
    }

    /// Folders of this process' version 1 control group of one controller and of its parents, its own
    /// first.
    pub fn cgroup_v1(&self, controller: &str) -> Vec<PathBuf> {
        let is_ours = |controllers: &str| controllers.split(',').any(|c| c == controller);
        self.cgroups(is_ours, &format!("sys/fs/cgroup/{controller}"))
    }

    /// Inside a container the path of `/proc/self/cgroup` is often not visible; the mount point
    /// itself is then the container's own group, and it is always the last folder.
    fn cgroups(&self, is_ours: impl Fn(&str) -> bool, mount: &str) -> Vec<PathBuf> {
        let groups = self.text("proc/self/cgroup").unwrap_or_default();
        let path = groups.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            is_ours(controllers).then_some(path)
        });
        let Some(path) = path else {
            return Vec::new();
        };
        Path::new(path.trim_start_matches('/'))
            .ancestors()
            .map(|group| Path::new(mount).join(group))
            .collect()
    }
}

/// A folder of small files to stand in for `/proc` and `/sys`.
#[cfg(test)]
pub fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}
