//! How the source files hang together: who may import whom, no circles, no file too long.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Top modules from above to below: each may import those after it.
const LAYERS: [&str; 10] = [
    "main", "cli", "commands", "server", "report", "engine", "model", "backend", "hardware",
    "formats",
];

/// What `planning` may import from outside: nothing but these.
const PURE: [&str; 3] = ["planning", "units", "stats"];

/// Imports from below that are there for now; the list may only shrink.
const KNOWN_UPWARD: [(&str, &str); 1] = [("commands", "cli")];

/// Files that import each other for now, by one of them; the list may only shrink.
const KNOWN_CIRCLES: [&str; 7] = [
    "backend::cuda::prefill::chunk",
    "backend::cuda::saved",
    "cli",
    "model::hub",
    "model::synth::embedding",
    "model::synth::memory",
    "report::metrics",
];

const MOST_LINES: usize = 620;

/// Files that are longer for now, and how long they may be; the list may only shrink.
const KNOWN_LONG: [(&str, usize); 0] = [];

/// Module path of every file in src, `backend::cpu` for `src/backend/cpu/mod.rs`.
fn modules() -> BTreeMap<String, PathBuf> {
    fn walk(folder: &Path, module: &str, found: &mut BTreeMap<String, PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap();
            let inside = match module {
                "" => name.to_string(),
                _ => format!("{module}::{name}"),
            };
            if path.is_dir() {
                walk(&path, &inside, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let module = match name {
                    "mod" => module.to_string(),
                    _ => inside,
                };
                found.insert(module, path);
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(Path::new("src"), "", &mut found);
    found.remove("lib");
    found
}

/// Modules that the file of `module` imports, but for its tests.
fn imports(module: &str, modules: &BTreeMap<String, PathBuf>) -> BTreeSet<String> {
    let text = fs::read_to_string(&modules[module]).unwrap();
    let code: String = (text.lines())
        .scan("", |before, line| {
            let is_tests =
                *before == "#[cfg(test)]" && line.contains("mod ") && line.ends_with('{');
            *before = line;
            (!is_tests).then_some(line.split("//").next().unwrap_or("").to_string() + "\n")
        })
        .collect();
    let mut found = BTreeSet::new();
    for statement in code.split(';') {
        let start = statement.rfind("use ").filter(|&at| {
            let line = statement[..at].rsplit('\n').next().unwrap_or("").trim();
            line.is_empty() || line.starts_with("pub")
        });
        let Some(start) = start else { continue };
        for path in expand(&statement[start + 4..]) {
            let path = absolute(module, &path);
            let longest = (1..=path.len()).rev().map(|n| path[..n].join("::"));
            let target = longest.into_iter().find(|path| modules.contains_key(path));
            found.extend(target.filter(|target| target != module));
        }
    }
    found
}

/// The paths of a tree such as `a::{b, c::{d, e}}`.
fn expand(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((prefix, inner)) = tree.split_once('{') else {
        return vec![tree.split(" as ").next().unwrap().to_string()];
    };
    let inner = inner.strip_suffix('}').unwrap_or(inner);
    let (mut depth, mut parts) = (0, vec![String::new()]);
    for c in inner.chars() {
        match c {
            ',' if depth == 0 => parts.push(String::new()),
            _ => {
                depth += i32::from(c == '{') - i32::from(c == '}');
                parts.last_mut().unwrap().push(c);
            }
        }
    }
    let paths = parts.iter().filter(|part| !part.trim().is_empty());
    paths
        .flat_map(|part| expand(part))
        .map(|path| format!("{prefix}{path}"))
        .collect()
}

/// `path` from the root of the crate, as `module` means it.
fn absolute(module: &str, path: &str) -> Vec<String> {
    let mut base: Vec<String> = module.split("::").map(String::from).collect();
    let mut names = path.split("::").map(str::trim).peekable();
    match names.peek() {
        Some(&"crate") => {
            base.clear();
            names.next();
        }
        Some(&"self") => _ = names.next(),
        _ => {}
    }
    while names.next_if_eq(&"super").is_some() {
        base.pop();
    }
    base.extend(names.map(String::from));
    base
}

fn graph() -> BTreeMap<String, BTreeSet<String>> {
    let modules = modules();
    let of = |module: &String| (module.clone(), imports(module, &modules));
    modules.keys().map(of).collect()
}

#[test]
fn modules_import_only_what_is_below_them_and_planning_nothing() {
    let mut wrong = Vec::new();
    for (module, imported) in graph() {
        let top = |path: &str| path.split("::").next().unwrap().to_string();
        let rank = |path: &str| LAYERS.iter().position(|layer| *layer == top(path));
        for target in &imported {
            let known = KNOWN_UPWARD.contains(&(&top(&module), &top(target)));
            let is_wrong = match (top(&module) == "planning", rank(&module), rank(target)) {
                (true, ..) => !PURE.contains(&&*top(target)),
                (_, Some(from), Some(to)) => to < from && !known,
                _ => false,
            };
            if is_wrong {
                wrong.push(format!("{module} imports {target}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A folder's own file may name what is in the folder, which may use what the folder's file has.
#[test]
fn no_files_import_each_other_in_a_circle() {
    let graph = graph();
    let reached = |from: &str| {
        let (mut seen, mut open) = (BTreeSet::new(), vec![from.to_string()]);
        while let Some(module) = open.pop() {
            let inside = format!("{module}::");
            for target in &graph[&module] {
                if !target.starts_with(&inside) && seen.insert(target.clone()) {
                    open.push(target.clone());
                }
            }
        }
        seen
    };
    let all: BTreeMap<&String, BTreeSet<String>> = graph
        .keys()
        .map(|module| (module, reached(module)))
        .collect();
    let mut circles: Vec<BTreeSet<&String>> = Vec::new();
    for (module, seen) in &all {
        let both: BTreeSet<&String> = (all.iter())
            .filter(|(other, back)| seen.contains(**other) && back.contains(*module))
            .map(|(other, _)| *other)
            .collect();
        if both.len() > 1 && !circles.contains(&both) {
            circles.push(both);
        }
    }
    let is_known = |circle: &BTreeSet<&String>| {
        let known = |module: &&&String| KNOWN_CIRCLES.contains(&module.as_str());
        circle.iter().find(known).is_some()
    };
    let (known, new): (Vec<_>, Vec<_>) = circles.into_iter().partition(is_known);
    assert!(new.is_empty(), "{new:#?}");
    assert_eq!(
        known.len(),
        KNOWN_CIRCLES.len(),
        "strike out what is no circle any more"
    );
}

#[test]
fn no_file_is_too_long_to_read_at_a_sitting() {
    let modules = modules();
    for (module, path) in &modules {
        let lines = fs::read_to_string(path).unwrap().lines().count();
        let known = KNOWN_LONG.iter().find(|(known, _)| known == module);
        let most = known.map_or(MOST_LINES, |&(_, most)| most);
        assert!(
            lines <= most,
            "{}: {lines} lines, at most {most}",
            path.display()
        );
    }
    for (module, most) in KNOWN_LONG {
        let lines = fs::read_to_string(&modules[module])
            .unwrap()
            .lines()
            .count();
        assert!(
            most > MOST_LINES && lines > MOST_LINES,
            "{module} is short enough now"
        );
    }
}
