//! The `quantflow` command. See [`quantflow::cli`].

fn main() -> std::process::ExitCode {
    quantflow::cli::main()
}
