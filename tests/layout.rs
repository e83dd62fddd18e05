//! The import directions of ARCHITECTURE.md, and the bans that keep a module's promise.

use std::path::{Path, PathBuf};

/// Modules in layers: a module may import from its own layer's earlier lines and from the layers before.
const LAYERS: [&[&str]; 13] = [
    &["error", "system"],
    &["storage", "budget"],
    &["memory"],
    &["report", "numerics"],
    &["formats"],
    &["checkpoint", "ledger", "statistics"],
    &["device"],
    &["model", "calibration", "recipe"],
    &["plan", "artifact"],
    &["allocation"],
    &["operators"],
    &["pipelines"],
    &["cli"],
];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// (module, file, text) of every source file.
fn modules() -> Vec<(String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut all = Vec::new();
    for (folder, fixed) in [("src", None), ("pipelines", Some("pipelines"))] {
        for path in sources(&root.join(folder)) {
            let inner = path.strip_prefix(root.join(folder)).unwrap().to_owned();
            let first = inner.components().next().unwrap().as_os_str().to_str().unwrap();
            let module = fixed.unwrap_or(first.trim_end_matches(".rs")).to_owned();
            let text = std::fs::read_to_string(&path).unwrap();
            all.push((module, path, text));
        }
    }
    all
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

#[test]
fn imports_go_one_way() {
    let mut seen = 0;
    for (module, path, text) in modules() {
        if ["lib", "main"].contains(&module.as_str()) {
            continue;
        }
        let own = layer(&module).unwrap_or_else(|| panic!("{module} has no layer: add it to LAYERS"));
        for (at, _) in text.match_indices("crate::") {
            let target: String = text[at + 7..]
                .chars()
                .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
                .collect();
            let Some(other) = layer(&target) else { continue };
            seen += 1;
            assert!(
                other < own || target == module,
                "{} imports {target}, which is above it",
                path.display()
            );
        }
    }
    assert!(seen > 100, "only {seen} imports were looked at");
}

#[test]
fn numerics_knows_neither_timely_nor_files_and_operators_no_command_line() {
    let forbidden = [
        ("numerics", vec!["timely", "std::fs", "std::path", "candle"]),
        ("statistics", vec!["timely", "std::fs", "candle"]),
        ("formats", vec!["timely", "std::fs", "candle"]),
        ("model", vec!["timely", "std::fs"]),
        ("operators", vec!["clap", "indicatif", "println!"]),
    ];
    for (module, path, text) in modules() {
        let words = forbidden
            .iter()
            .filter(|(name, _)| *name == module)
            .flat_map(|(_, words)| words);
        for word in words {
            let mut code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            let found = code.find(|line| line.contains(word));
            assert_eq!(found, None, "{} must not know {word}", path.display());
        }
    }
}

#[test]
fn every_file_says_what_it_owns() {
    for (_, path, text) in modules() {
        assert!(
            text.starts_with("//!"),
            "{} does not begin with //!",
            path.display()
        );
    }
}
