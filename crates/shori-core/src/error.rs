//! One error type: what was done, to what, why it failed, and what a person can do about it.

use std::fmt;

pub type Result<T, E = Error> = std::result::Result<T, E>;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// What went wrong, as far as the engine must tell it apart. [`ErrorKind::response`] is the only place that maps a kind
/// to what is done about it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
pub enum ErrorKind {
    /// The configuration or the command line is wrong.
    Usage,
    /// The other side did not answer, or not now (down, locked by a writer, timed out).
    Unavailable,
    /// Another process holds what only one may hold.
    InUse,
    /// Source retention has passed the watermark (contract 8).
    Gap,
    /// The source is not the one that the log was read from.
    SourceReplaced,
    /// A table cannot be captured, or no longer: no key, a type that cannot be carried, a column retyped.
    Schema,
    /// A value or message that cannot be decoded (contract 7).
    Data,
    /// A projection's SQL fails to parse, bind or run.
    Projection,
    /// No space left on this machine, or a quota. A server that has none is `Unavailable`.
    DiskFull,
    /// A file is damaged or not what it should be.
    Corrupt,
    /// Any other refusal by the other side.
    Refused,
    /// A defect of Shori.
    Internal,
}

/// What the engine does about an error.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Response {
    /// Try again, with growing pauses.
    Retry,
    /// The capture or projection stops until a person acts; its neighbours go on (contract 11).
    StopPart,
    /// The pipeline stops.
    StopPipeline,
}

impl ErrorKind {
    pub fn response(self) -> Response {
        match self {
            ErrorKind::Unavailable | ErrorKind::Projection | ErrorKind::Refused => Response::Retry,
            ErrorKind::Gap | ErrorKind::Schema | ErrorKind::Data => Response::StopPart,
            ErrorKind::Usage
            | ErrorKind::InUse
            | ErrorKind::SourceReplaced
            | ErrorKind::DiskFull
            | ErrorKind::Corrupt
            | ErrorKind::Internal => Response::StopPipeline,
        }
    }
}

/// An operation on an object failed for a cause. Printed as `cannot {operation} {object}: {cause}; {remedy}`.
pub struct Error(Box<Parts>);

struct Parts {
    kind: ErrorKind,
    operation: String,
    object: String,
    cause: Cause,
    remedy: Option<String>,
}

impl Error {
    /// `operation` is a verb ("read"), `object` what it was done to ("table orders").
    pub fn new(
        kind: ErrorKind,
        operation: impl Into<String>,
        object: impl Into<String>,
        cause: impl Into<Cause>,
    ) -> Self {
        Self(Box::new(Parts {
            kind,
            operation: operation.into(),
            object: object.into(),
            cause: cause.into(),
            remedy: None,
        }))
    }

    /// An error that has been told, for somebody else to hear: `told` is all that is printed.
    pub fn repeated(kind: ErrorKind, told: impl Into<Cause>) -> Self {
        Self::new(kind, "", "", told)
    }

    /// What the reader can do, as a sentence without a full stop: `run shori resnapshot orders`.
    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.0.remedy = Some(remedy.into());
        self
    }

    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    pub fn operation(&self) -> &str {
        &self.0.operation
    }

    pub fn object(&self) -> &str {
        &self.0.object
    }

    pub fn remedy(&self) -> Option<&str> {
        self.0.remedy.as_deref()
    }

    pub fn response(&self) -> Response {
        self.0.kind.response()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parts { operation, object, cause, remedy, .. } = &*self.0;
        if !operation.is_empty() {
            write!(f, "cannot {operation} {object}: ")?;
        }
        write!(f, "{cause}")?;
        let mut inner = cause.source();
        while let Some(next) = inner {
            write!(f, ": {next}")?;
            inner = next.source();
        }
        match remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.0.cause)
    }
}

impl From<arrow::error::ArrowError> for Error {
    fn from(cause: arrow::error::ArrowError) -> Self {
        Error::new(ErrorKind::Internal, "build", "a batch of rows", cause)
    }
}
