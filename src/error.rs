//! The one error type of the library. Every variant names the file, tensor or flag at fault; where a
//! way out is known it is the [`Error::hint`]. The binary prints message, blank line, hint.

use std::path::{Path, PathBuf};

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong, by who can mend it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused something.
    #[error("could not {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb: `read`, `create`, `rename`.
        action: &'static str,
        /// The file or folder it was tried on.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Input that was read but cannot be used: a file, a tensor, a row.
    #[error("{subject}: {problem}")]
    Invalid {
        /// The file, tensor or row.
        subject: String,
        /// What is wrong with it.
        problem: String,
        /// The way out, or empty.
        hint: String,
    },
    /// A flag or recipe value that cannot be honoured.
    #[error("{flag}: {problem}")]
    Usage {
        /// The flag or recipe key as the user knows it.
        flag: String,
        /// Why it cannot be honoured.
        problem: String,
        /// The way out, or empty.
        hint: String,
    },
    /// A Hessian that stays indefinite however much it is damped.
    #[error("could not factor the Hessian of {site}: pivot {pivot} is not positive")]
    Factor {
        /// The site, by the name of its first linear.
        site: String,
        /// The column at which the factorization broke down.
        pivot: usize,
    },
    /// A tensor operation failed.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A worker of the dataflow stopped.
    #[error("a worker stopped: {0}")]
    Worker(String),
    /// The user asked to stop (Ctrl-C); the run can be continued.
    #[error("stopped at a safe point")]
    Interrupted,
}

impl Error {
    /// Bad input in `subject` (a file, tensor or row); `hint` may be empty.
    pub fn invalid(subject: impl Into<String>, problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Invalid {
            subject: subject.into(),
            problem: problem.into(),
            hint: hint.into(),
        }
    }

    /// A flag that cannot be honoured; `hint` may be empty.
    pub fn usage(flag: impl Into<String>, problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage {
            flag: flag.into(),
            problem: problem.into(),
            hint: hint.into(),
        }
    }

    /// The way out, if one is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Invalid { hint, .. } | Self::Usage { hint, .. } => (!hint.is_empty()).then(|| hint.clone()),
            Self::Io { source, path, .. } => match source.kind() {
                std::io::ErrorKind::StorageFull => Some(format!(
                    "free some space on the disk of {}; finished blocks are kept, the same command continues",
                    path.display()
                )),
                std::io::ErrorKind::PermissionDenied => {
                    Some(format!("check the permissions of {}", path.display()))
                }
                _ => None,
            },
            Self::Factor { .. } => Some("raise --damp-percent, or calibrate with more tokens".into()),
            Self::Interrupted => Some("run the same command again to continue".into()),
            Self::Tensor(_) | Self::Worker(_) => None,
        }
    }
}

/// Attaches an action and a path to an I/O error.
pub trait IoContext<T> {
    /// Names what was tried (`read`, `create`, …) and on which path.
    fn context(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io {
            action,
            path: path.to_owned(),
            source,
        })
    }
}
