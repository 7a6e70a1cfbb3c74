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

/// Of a source file, in Rust or CUDA.
const MOST_LINES: usize = 600;

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
            let is_wrong = match (top(&module) == "planning", rank(&module), rank(target)) {
                (true, ..) => !PURE.contains(&&*top(target)),
                (_, Some(from), Some(to)) => to < from,
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
    assert!(circles.is_empty(), "{circles:#?}");
}

/// The code of a file before its tests, line by line.
fn lines_of(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    let lines: Vec<String> = text.lines().map(String::from).collect();
    let is_tests = |pair: &[String]| {
        pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod ") && pair[1].ends_with('{')
    };
    let end = lines.windows(2).position(is_tests).unwrap_or(lines.len());
    lines[..end].to_vec()
}

/// Whether a signature, as far as its first line that ends in `{` or `;`, returns a `Result`.
fn returns_result(signature: &str) -> bool {
    let Some((_, returned)) = signature.rsplit_once("->") else {
        return false;
    };
    let name = returned.trim().split('<').next().unwrap_or("");
    name.rsplit("::")
        .next()
        .is_some_and(|last| last.trim().trim_end_matches([';', '{']).trim() == "Result")
}

#[test]
fn every_public_function_that_may_fail_says_how() {
    let mut silent = Vec::new();
    for path in modules().values() {
        let lines = lines_of(path);
        for (at, line) in lines.iter().enumerate() {
            let words: Vec<&str> = line.split_whitespace().take(4).collect();
            if words.first() != Some(&"pub") || !words.contains(&"fn") {
                continue;
            }
            let end = (at..lines.len()).find(|&i| lines[i].ends_with(['{', ';']));
            let signature = lines[at..=end.unwrap_or(at)].join(" ");
            let above = lines[..at].iter().rev().map(|line| line.trim());
            let mut docs = above.take_while(|l| l.starts_with("///") || l.starts_with("#["));
            if returns_result(&signature) && !docs.any(|doc| doc == "/// # Errors") {
                silent.push(format!("{}:{}: {}", path.display(), at + 1, line.trim()));
            }
        }
    }
    assert!(silent.is_empty(), "no `# Errors`:\n{}", silent.join("\n"));
}

#[test]
fn no_file_is_too_long_to_read_at_a_sitting() {
    let kernels = fs::read_dir("kernels")
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let kernels = kernels.filter(|path| path.is_file());
    for path in modules().into_values().chain(kernels) {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        let most = MOST_LINES;
        assert!(
            lines <= most,
            "{}: {lines} lines, at most {most}",
            path.display()
        );
    }
}
