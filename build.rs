//! Tells the program what built it, for its records, and compiles the kernels.
//!
//! Feature `cuda`: each `kernels/*.cu` becomes a fatbin by nvcc, listed in `$OUT_DIR/fatbins.rs`.
//! `kernels/*_sm90.cu` use what only compute capability 9.0 has: they are compiled for sm_90a alone, where
//! kernels for Hopper are asked for, and left out of the emulator.
//! Feature `emulate`: the same files become a static library by g++, with `kernels/emulate/`.
//! Without them, a Rust toolchain is all it takes.
//!
//! - `MOECTL_NVCC`: the nvcc to use [default: `.cuda/bin/nvcc`, `$CUDA_HOME/bin/nvcc`, the PATH's]
//! - `MOECTL_CUDA_ARCH`: architectures to compile for, such as `90` or `80,89` [default: all]

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let rustc = std::env::var("RUSTC").unwrap_or("rustc".into());
    let version = Command::new(rustc).arg("--version").output().ok();
    let version = version
        .and_then(|out| String::from_utf8(out.stdout).ok())
        .unwrap_or_default();
    let version = version.split_whitespace().nth(1).unwrap_or("unknown");
    println!("cargo::rustc-env=MOECTL_RUSTC={version}");
    let target = std::env::var("TARGET").unwrap_or("unknown".into());
    println!("cargo::rustc-env=MOECTL_TARGET={target}");

    #[cfg(feature = "cuda")]
    cuda::compile();
    #[cfg(feature = "emulate")]
    emulate::compile();
}

/// What both compilers share: the files, two at a time, and only those that changed.
#[cfg(any(feature = "cuda", feature = "emulate"))]
mod sources {
    use std::hash::{DefaultHasher, Hash, Hasher};
    use std::path::{Path, PathBuf};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// nvcc takes up to 1 GB for one file.
    const MAX_JOBS: usize = 2;

    /// `<dir>/*.<extension>`, sorted. Cargo runs the build script again when any of `kernels/` changes.
    pub fn list(dir: &str, extension: &str) -> Vec<PathBuf> {
        println!("cargo::rerun-if-changed=kernels");
        let entries = std::fs::read_dir(dir).unwrap_or_else(|e| fail(&format!("{dir}: {e}")));
        let mut paths: Vec<PathBuf> = entries
            .map(|entry| entry.expect("kernels/ can be listed").path())
            .filter(|path| path.extension().is_some_and(|e| e == extension))
            .collect();
        paths.sort();
        paths
    }

    /// Whether `path` uses instructions that only compute capability 9.0 has.
    pub fn is_for_hopper(path: &Path) -> bool {
        stem(path).ends_with("_sm90")
    }

    /// `linear` of `kernels/linear.cu`.
    pub fn stem(path: &Path) -> &str {
        path.file_stem()
            .and_then(|stem| stem.to_str())
            .expect("kernels have ASCII names")
    }

    pub fn out_dir() -> PathBuf {
        PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR"))
    }

    /// Prints an error without a backtrace and stops the build.
    pub fn fail(message: &str) -> ! {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }

    pub fn hash_file(path: &Path, hasher: &mut DefaultHasher) {
        let text = std::fs::read(path).unwrap_or_else(|e| fail(&format!("{path:?}: {e}")));
        text.hash(hasher);
    }

    /// Runs `compile(source, output)` for each source whose output is older than its text or than what
    /// `shared` has hashed, and returns the outputs, `$OUT_DIR/<dir>/<stem>.<extension>`.
    pub fn compile_changed(
        sources: &[PathBuf],
        shared: &DefaultHasher,
        dir: &str,
        extension: &str,
        compile: impl Fn(&Path, &Path) -> Result<(), String> + Sync,
    ) -> Vec<PathBuf> {
        let dir = out_dir().join(dir);
        std::fs::create_dir_all(&dir).expect("OUT_DIR can be written");
        let output = |source: &Path| dir.join(stem(source)).with_extension(extension);
        let one = |source: &Path| -> Result<(), String> {
            let output = output(source);
            let stamp = output.with_extension("hash");
            let mut hasher = shared.clone();
            hash_file(source, &mut hasher);
            let hash = format!("{:016x}", hasher.finish());
            if output.is_file() && std::fs::read_to_string(&stamp).is_ok_and(|old| old == hash) {
                return Ok(());
            }
            let _ = std::fs::remove_file(&stamp);
            compile(source, &output)?;
            std::fs::write(&stamp, hash).map_err(|error| format!("{stamp:?}: {error}"))
        };
        let next = AtomicUsize::new(0);
        let errors = Mutex::new(Vec::new());
        let jobs = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok());
        std::thread::scope(|scope| {
            for _ in 0..jobs.unwrap_or(1).min(MAX_JOBS) {
                scope.spawn(|| {
                    while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(error) = one(source) {
                            errors.lock().expect("no job panics").push(error);
                        }
                    }
                });
            }
        });
        let errors = errors.into_inner().expect("no job panics");
        if !errors.is_empty() {
            fail(&errors.join("\n"));
        }
        sources.iter().map(|source| output(source)).collect()
    }

    /// Runs a compiler; what it says becomes warnings, or the error.
    pub fn run(mut command: std::process::Command, source: &Path) -> Result<(), String> {
        let program = command.get_program().to_string_lossy().into_owned();
        let out = command
            .output()
            .map_err(|error| format!("{program}: {error}"))?;
        let messages = String::from_utf8_lossy(&out.stderr);
        if !out.status.success() {
            let source = source.display();
            return Err(format!("{program} on {source}: {}\n{messages}", out.status));
        }
        for line in messages.lines().filter(|line| !line.is_empty()) {
            println!("cargo::warning={line}");
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::hash::{DefaultHasher, Hash};
    use std::path::PathBuf;
    use std::process::Command;

    use crate::sources::{
        compile_changed, fail, hash_file, is_for_hopper, list, out_dir, run, stem,
    };

    /// Ampere (A100; 30 series), Ada, Hopper, consumer Blackwell. The PTX serves every other GPU from
    /// Ampere on, compiled by the driver.
    const ARCHITECTURES: &[&str] = &["80", "86", "89", "90", "120"];
    const PTX: &str = "80";
    /// Of `*_sm90.cu`.
    const HOPPER: &str = "-gencode=arch=compute_90a,code=sm_90a";
    const FLAGS: [&str; 4] = ["-fatbin", "-std=c++17", "-O3", "-Ikernels"];

    pub fn compile() {
        for name in ["MOECTL_NVCC", "MOECTL_CUDA_ARCH", "CUDA_HOME"] {
            println!("cargo::rerun-if-env-changed={name}");
        }
        let nvcc = find_nvcc();
        let version = match Command::new(&nvcc).arg("--version").output() {
            Ok(out) if out.status.success() => out.stdout,
            Ok(out) => fail(&format!("{} --version: {}", nvcc.display(), out.status)),
            Err(error) => fail(&format!("{}: {error}", nvcc.display())),
        };
        let architectures = architectures();
        let targets = targets(&architectures);
        let mut shared = DefaultHasher::new();
        (&version, &FLAGS, &targets, HOPPER).hash(&mut shared);
        for header in list("kernels", "cuh") {
            hash_file(&header, &mut shared);
        }
        let mut sources = list("kernels", "cu");
        let hopper = architectures.is_empty() || architectures.iter().any(|a| a.starts_with("90"));
        sources.retain(|source| hopper || !is_for_hopper(source));
        compile_changed(&sources, &shared, "fatbins", "fatbin", |source, output| {
            let mut command = Command::new(&nvcc);
            command.args(FLAGS);
            match is_for_hopper(source) {
                true => command.arg(HOPPER),
                false => command.args(&targets),
            };
            command.arg("-o").arg(output).arg(source);
            run(command, source)
        });
        write_list(&sources);
    }

    fn find_nvcc() -> PathBuf {
        if let Some(nvcc) = std::env::var_os("MOECTL_NVCC") {
            return nvcc.into();
        }
        let home = std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::iter::once(PathBuf::from(".cuda/bin"))
            .chain(home)
            .chain(std::env::split_paths(&path))
            .map(|dir| dir.join("nvcc"))
            .find(|nvcc| nvcc.is_file())
            .map(|nvcc| std::path::absolute(nvcc).expect("the working directory exists"))
            .unwrap_or_else(|| {
                fail(
                    "feature `cuda` needs CUDA's compiler: no nvcc in .cuda/bin, $CUDA_HOME/bin or the PATH\n\
                     run scripts/setup-cuda.sh (needs python3 with pip), or set MOECTL_NVCC to an nvcc 12.8 or newer",
                )
            })
    }

    /// What `MOECTL_CUDA_ARCH` names; empty for all.
    fn architectures() -> Vec<String> {
        let restricted = std::env::var("MOECTL_CUDA_ARCH").unwrap_or_default();
        let named = restricted.split(',').map(str::trim);
        named.filter(|a| !a.is_empty()).map(String::from).collect()
    }

    /// Machine code to make, for `named` architectures or all.
    fn targets(named: &[String]) -> Vec<String> {
        let target = |of: &str, code: &str| format!("-gencode=arch=compute_{of},code={code}_{of}");
        if !named.is_empty() {
            return named.iter().map(|arch| target(arch, "sm")).collect();
        }
        let all = ARCHITECTURES.iter().map(|arch| target(arch, "sm"));
        all.chain([target(PTX, "compute")]).collect()
    }

    /// `FATBINS`: name and bytes of each, aligned as the driver's structures want.
    fn write_list(sources: &[PathBuf]) {
        let mut list = String::from(
            "#[repr(C, align(64))]\nstruct Aligned<T: ?Sized>(T);\n\
             pub const FATBINS: &[(&str, &[u8])] = &[\n",
        );
        for source in sources {
            let name = stem(source);
            list += &format!(
                "    (\"{name}\", {{\n        \
                 static FILE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!(\"OUT_DIR\"), \"/fatbins/{name}.fatbin\")));\n        \
                 &FILE.0\n    }}),\n"
            );
        }
        list += "];\n";
        std::fs::write(out_dir().join("fatbins.rs"), list).expect("OUT_DIR can be written");
    }
}

#[cfg(feature = "emulate")]
mod emulate {
    use std::hash::{DefaultHasher, Hash};
    use std::path::PathBuf;

    use crate::sources::{compile_changed, fail, hash_file, is_for_hopper, list, run, stem};

    pub fn compile() {
        let arch = std::env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
        if arch != "x86_64" {
            fail(&format!(
                "feature `emulate` switches stacks in x86-64 assembly, the target is {arch}"
            ));
        }
        let mut build = cc::Build::new();
        build
            .cpp(true)
            .std("c++17")
            .include("kernels")
            .define("MOECTL_EMULATE", None)
            .flag("-fno-strict-aliasing")
            // Emulated kernels are slow enough; a debug build's would be ten times slower.
            .opt_level(2)
            .warnings(false);
        let compiler = build.get_compiler();
        let mut shared = DefaultHasher::new();
        format!("{compiler:?}").hash(&mut shared);
        for (dir, extension) in [("kernels", "cuh"), ("kernels/emulate", "h")] {
            for header in list(dir, extension) {
                hash_file(&header, &mut shared);
            }
        }
        let mut sources = list("kernels", "cu");
        sources.retain(|source| !is_for_hopper(source));
        sources.push(PathBuf::from("kernels/emulate/emulator.cpp"));
        let objects = compile_changed(&sources, &shared, "emulate", "o", |source, output| {
            let mut unit = PathBuf::from(source);
            if source.extension().is_some_and(|e| e == "cu") {
                // Each kernel file in a namespace of its own, because on a GPU each is a module of
                // its own: helpers of the same name don't meet.
                unit = output.with_extension("cpp");
                let text = format!(
                    "#include \"common.cuh\"\nnamespace {{\n#include \"{}.cu\"\n}}\n",
                    stem(source)
                );
                std::fs::write(&unit, text).map_err(|error| format!("{unit:?}: {error}"))?;
            }
            let mut command = compiler.to_command();
            command.arg("-c").arg(&unit).arg("-o").arg(output);
            run(command, source)
        });
        build
            .objects(objects)
            // Nothing refers to the kernels: they register themselves before main.
            .link_lib_modifier("+whole-archive")
            .compile("moectl_emulate");
    }
}
