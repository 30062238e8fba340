//! Database servers, as sources and stores name them.

use std::path::PathBuf;

use serde::Deserialize;
use shori_core::secret::Secret;

/// A database server and who asks it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    pub host: String,
    #[serde(default = "postgres_port")]
    pub port: u16,
    pub database: String,
    pub user: String,
    pub password: Option<Secret>,
    /// A file that holds the password alone.
    pub password_file: Option<PathBuf>,
    /// Verified if not given, but on this machine.
    pub tls: Option<TlsMode>,
    /// PEM file of the certificates that are trusted; those of the system if not given.
    pub tls_roots: Option<PathBuf>,
    #[serde(default = "connect_timeout_seconds")]
    pub connect_timeout_seconds: u64,
    #[serde(default = "statement_timeout_seconds")]
    pub statement_timeout_seconds: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TlsMode {
    /// The server's certificate and its name are verified.
    Verify,
    Off,
}

fn postgres_port() -> u16 {
    5432
}

fn connect_timeout_seconds() -> u64 {
    10
}

fn statement_timeout_seconds() -> u64 {
    60
}
