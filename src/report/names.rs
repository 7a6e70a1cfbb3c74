//! Short names for runs, by the part of their paths in which they differ.

use std::path::Path;

/// One name per path: folders that all share are left out at both ends, and so is `run.json`.
///
/// `a/run.json b/run.json` are `a` and `b`; `out/old.json out/new.json` are `old` and `new`.
pub fn distinguishing(paths: &[&Path]) -> Vec<String> {
    let all: Vec<Vec<String>> = paths.iter().map(|path| parts(path)).collect();
    let shortest = all.iter().map(Vec::len).min().unwrap_or(0);
    let shared = |at: &dyn Fn(&Vec<String>, usize) -> String| {
        (0..shortest)
            .take_while(|&i| all.iter().all(|p| at(p, i) == at(&all[0], i)))
            .count()
    };
    let (head, tail) = match all.len() {
        0 | 1 => (shortest.saturating_sub(1), 0),
        _ => (
            shared(&|parts, i| parts[i].clone()),
            shared(&|parts, i| parts[parts.len() - 1 - i].clone()),
        ),
    };
    let mut names: Vec<String> = Vec::new();
    for parts in &all {
        // Where one path is a part of another, its last part is left.
        let head = head.min(parts.len() - 1);
        let end = (parts.len() - tail.min(parts.len() - 1)).max(head + 1);
        let name = parts[head..end].join("/");
        let again = names
            .iter()
            .filter(|n| **n == name || n.starts_with(&format!("{name} #")));
        let name = match again.count() {
            0 => name,
            n => format!("{name} #{}", n + 1),
        };
        names.push(name);
    }
    names
}

/// Folders and the file's stem; `run.json` says nothing where a folder does.
fn parts(path: &Path) -> Vec<String> {
    let mut parts: Vec<String> = path
        .parent()
        .into_iter()
        .flat_map(|folder| folder.components())
        .map(|part| part.as_os_str().to_string_lossy().into_owned())
        .filter(|part| part != "." && part != "/")
        .collect();
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    if stem != "run" || parts.is_empty() {
        parts.push(stem.into_owned());
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_named_by_what_differs() {
        for (paths, expected) in [
            (vec!["base/run.json", "new/run.json"], vec!["base", "new"]),
            (vec!["out/old.json", "out/new.json"], vec!["old", "new"]),
            (
                vec!["reports/a/x/run.json", "reports/b/x/run.json"],
                vec!["a", "b"],
            ),
            (
                vec!["bench-out/run.json", "slower.json"],
                vec!["bench-out", "slower"],
            ),
            (vec!["run.json", "old/run.json"], vec!["run", "old"]),
            (vec!["/tmp/today/run.json"], vec!["today"]),
            (vec!["run.json"], vec!["run"]),
            (vec!["a/run.json", "a/run.json"], vec!["a", "a #2"]),
        ] {
            let paths: Vec<&Path> = paths.into_iter().map(Path::new).collect();
            assert_eq!(distinguishing(&paths), expected, "{paths:?}");
        }
    }
}
