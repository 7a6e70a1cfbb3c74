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

    /// The settings of this process' control group, own group first, then its parents.
    ///
    /// Inside a container the path of `/proc/self/cgroup` is often not visible; the mount point
    /// itself is then the container's own group, and it is always the last folder tried.
    pub fn cgroup_files(&self, controller: &str, v1_file: &str, v2_file: &str) -> Vec<String> {
        let groups = self.text("proc/self/cgroup").unwrap_or_default();
        let mut files = Vec::new();
        for line in groups.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
                continue;
            };
            let (mount, file) = if controllers.is_empty() {
                ("sys/fs/cgroup".to_string(), v2_file)
            } else if controllers.split(',').any(|c| c == controller) {
                (format!("sys/fs/cgroup/{controller}"), v1_file)
            } else {
                continue;
            };
            let mut group = Path::new(path.trim_start_matches('/'));
            loop {
                files.extend(self.text(Path::new(&mount).join(group).join(file)));
                match group.parent() {
                    Some(parent) => group = parent,
                    None => break,
                }
            }
        }
        files
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
