//! Connections: one kind for SQL, one for replication, to the same server by the same settings.
//!
//! # Constraints
//!
//! - TLS is verified in full, chain and host name, against the roots of the system or one given file, unless it is
//!   switched off, which is the default only where nothing leaves the machine.
//! - Every wait is bounded: for a connection, for a statement, and for a peer that does not answer any more.
//! - A password appears in no error and no log.

use std::fmt::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pg_walstream::{PgReplicationConnection, ReplicationError};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use shori_core::secret::Secret;
use shori_core::{Error, ErrorKind, Result};
use tokio::task::JoinHandle;
use tokio_postgres::config::SslMode;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;

/// Where the server is, and who asks.
#[derive(Clone, Debug)]
pub struct Server {
    pub host: String,
    pub port: u16,
    pub database: String,
    pub user: String,
    pub password: Option<Secret>,
    pub tls: Tls,
    /// How long a connection may take, its start and authentication included.
    pub connect_timeout: Duration,
    /// How long a statement may take that reads no table whole.
    pub statement_timeout: Duration,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Tls {
    Off,
    /// Chain and host name, against the system's roots or those in one PEM file.
    Verified {
        roots: Option<PathBuf>,
    },
}

/// Where systems keep the roots they trust, in one PEM file: Debian and Alpine, Red Hat, SUSE, macOS and the BSDs.
const SYSTEM_ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// How long the network may leave what was sent unconfirmed.
const SILENCE_MAX: Duration = Duration::from_secs(25);

/// What makes values print as they are read here, the same on both kinds of connection.
pub(crate) const SESSION_SETTINGS: [(&str, &str); 7] = [
    ("application_name", "shori"),
    ("datestyle", "ISO, YMD"),
    ("intervalstyle", "postgres"),
    ("timezone", "UTC"),
    ("bytea_output", "hex"),
    ("extra_float_digits", "1"),
    ("xmloption", "content"),
];

/// A connection for SQL. Dropping it ends it, and whatever it is doing.
pub struct Session {
    pub client: Client,
    task: JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// For messages.
    pub fn name(&self) -> String {
        format!("PostgreSQL database {} at {}:{}", self.database, self.host, self.port)
    }

    /// Whether nothing between here and the server leaves this machine.
    pub fn is_local(host: &str) -> bool {
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    pub async fn connect(&self) -> Result<Session> {
        let mut config = tokio_postgres::Config::new();
        config
            .host(&self.host)
            .port(self.port)
            .dbname(&self.database)
            .user(&self.user)
            .application_name("shori")
            .connect_timeout(self.connect_timeout)
            .keepalives_idle(Duration::from_secs(30))
            .tcp_user_timeout(SILENCE_MAX);
        if let Some(password) = &self.password {
            config.password(password.reveal());
        }
        let connecting = async {
            let fail = self.fail("connect to");
            Ok::<_, Error>(match &self.tls {
                Tls::Off => {
                    config.ssl_mode(SslMode::Disable);
                    let (client, connection) = config.connect(NoTls).await.map_err(fail)?;
                    Session { client, task: tokio::spawn(async { drop(connection.await) }) }
                }
                Tls::Verified { roots } => {
                    config.ssl_mode(SslMode::Require);
                    let tls = MakeRustlsConnect::new(tls_config(roots.as_deref())?);
                    let (client, connection) = config.connect(tls).await.map_err(fail)?;
                    Session { client, task: tokio::spawn(async { drop(connection.await) }) }
                }
            })
        };
        let connected = tokio::time::timeout(self.connect_timeout, connecting).await;
        let session = connected.map_err(|_| self.timed_out())??;
        let mut settings = format!("set statement_timeout = {};", self.statement_timeout.as_millis());
        for (name, value) in SESSION_SETTINGS {
            // Writing to a string cannot fail.
            let _ = write!(settings, "set {name} = '{value}';");
        }
        session.client.batch_execute(&settings).await.map_err(self.fail("set up a session of"))?;
        Ok(session)
    }

    /// A connection that speaks the replication protocol.
    pub(crate) async fn connect_replication(&self) -> Result<PgReplicationConnection> {
        let url = self.replication_url()?;
        // The library connects with blocking calls.
        let connecting = tokio::task::spawn_blocking(move || {
            let mut connection = PgReplicationConnection::connect(&url)?;
            for (name, value) in SESSION_SETTINGS {
                connection.exec(&format!("set {name} = '{value}'"))?;
            }
            Ok(connection)
        });
        match tokio::time::timeout(self.connect_timeout * 2, connecting).await {
            Ok(Ok(connected)) => connected.map_err(self.fail_replication("connect for replication to")),
            Ok(Err(cause)) => Err(Error::new(ErrorKind::Internal, "connect to", self.name(), cause)),
            Err(_) => Err(self.timed_out()),
        }
    }

    fn timed_out(&self) -> Error {
        let cause = format!("no connection within {} s", self.connect_timeout.as_secs());
        Error::new(ErrorKind::Unavailable, "connect to", self.name(), cause)
    }

    fn replication_url(&self) -> Result<String> {
        let (mode, roots) = match &self.tls {
            Tls::Off => ("disable", None),
            Tls::Verified { roots } => ("verify-full", Some(roots_file(roots.as_deref())?)),
        };
        let seconds = self.connect_timeout.as_secs().max(1).to_string();
        let port = self.port.to_string();
        let roots = roots.map(|path| path.display().to_string());
        let password = self.password.as_ref().map(Secret::reveal);
        let parameters = [
            ("host", Some(self.host.as_str())),
            ("port", Some(&port)),
            ("user", Some(&self.user)),
            ("password", password),
            ("dbname", Some(&self.database)),
            ("sslmode", Some(mode)),
            ("sslrootcert", roots.as_deref()),
            ("replication", Some("database")),
            ("connect_timeout", Some(&seconds)),
        ];
        let given = parameters.iter().filter_map(|(name, value)| Some((name, (*value)?)));
        let encoded: Vec<String> = given.map(|(name, value)| format!("{name}={}", percent_encoded(value))).collect();
        Ok(format!("postgresql:///?{}", encoded.join("&")))
    }

    /// Makes errors of statements.
    pub(crate) fn fail(&self, operation: &'static str) -> impl Fn(tokio_postgres::Error) -> Error + use<> {
        let name = self.name();
        move |cause| sql_error(operation, &name, cause)
    }

    /// Makes errors of the replication connection.
    pub(crate) fn fail_replication(&self, operation: &'static str) -> impl Fn(ReplicationError) -> Error + use<> {
        let name = self.name();
        move |cause| {
            let kind = match &cause {
                ReplicationError::Authentication(_) | ReplicationError::Config(_) => ErrorKind::Usage,
                ReplicationError::PermanentConnection(_) => ErrorKind::Refused,
                _ => ErrorKind::Unavailable,
            };
            let error = Error::new(kind, operation, name.clone(), cause);
            if kind == ErrorKind::Usage { error.with_remedy(CREDENTIALS) } else { error }
        }
    }
}

const CREDENTIALS: &str = "correct user, password or database in the configuration";

/// The error that `operation` on `object` failed in the server, or on the way.
pub fn sql_error(operation: &str, object: &str, cause: tokio_postgres::Error) -> Error {
    let (kind, remedy) = match cause.code() {
        // What the library itself finds: no password, or a server that proves to be another.
        None if is_of_configuration(&cause) => (ErrorKind::Usage, Some(CREDENTIALS)),
        None => (ErrorKind::Unavailable, None),
        Some(code) => kind_of(code),
    };
    let error = match cause.as_db_error() {
        // Its own text says no more than that there was one.
        Some(told) => {
            let detail = told.detail().map(|detail| format!(" ({detail})")).unwrap_or_default();
            Error::new(kind, operation, object, format!("{}{detail}", told.message()))
        }
        None => Error::new(kind, operation, object, cause),
    };
    match remedy {
        Some(remedy) => error.with_remedy(remedy),
        None => error,
    }
}

/// The library tells its own kinds apart by their text only.
fn is_of_configuration(cause: &tokio_postgres::Error) -> bool {
    let told = cause.to_string();
    told.starts_with("invalid configuration") || told.starts_with("authentication error")
}

/// What an error's class (PostgreSQL documentation, appendix A) means to the engine.
fn kind_of(code: &SqlState) -> (ErrorKind, Option<&'static str>) {
    match code.code() {
        "28P01" | "28000" | "3D000" => (ErrorKind::Usage, Some(CREDENTIALS)),
        "42501" => (ErrorKind::Usage, Some("shori check names each missing right, and the statement that gives it")),
        // A lock, a statement's time, too many connections, a server that starts or ends, a slot in use.
        "55P03" | "55006" | "57014" => (ErrorKind::Unavailable, None),
        code if ["08", "53", "57", "40", "58"].contains(&&code[..2]) => (ErrorKind::Unavailable, None),
        _ => (ErrorKind::Refused, None),
    }
}

fn roots_file(given: Option<&Path>) -> Result<PathBuf> {
    let found = match given {
        Some(path) => Some(path.to_path_buf()),
        None => SYSTEM_ROOTS.iter().map(PathBuf::from).find(|path| path.is_file()),
    };
    found.ok_or_else(|| {
        let cause = format!("none of {} is there", SYSTEM_ROOTS.join(", "));
        Error::new(ErrorKind::Usage, "find", "the certificates that this system trusts", cause)
            .with_remedy("install ca-certificates, or name a file as tls_roots")
    })
}

fn tls_config(given: Option<&Path>) -> Result<ClientConfig> {
    let file = roots_file(given)?;
    let fail = |cause: String| {
        let object = format!("trusted certificates in {}", file.display());
        Error::new(ErrorKind::Usage, "read", object, cause).with_remedy("name a PEM file of certificates as tls_roots")
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(&file).map_err(|cause| fail(cause.to_string()))? {
        roots.add(certificate.map_err(|cause| fail(cause.to_string()))?).map_err(|cause| fail(cause.to_string()))?;
    }
    if roots.is_empty() {
        return Err(fail("it holds none".into()));
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Ok(versions.map_err(|cause| fail(cause.to_string()))?.with_root_certificates(roots).with_no_client_auth())
}

fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => encoded.push(char::from(byte)),
            // Writing to a string cannot fail.
            _ => drop(write!(encoded, "%{byte:02X}")),
        }
    }
    encoded
}

/// `name` as SQL takes it whatever it holds.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `text` as a literal in SQL.
pub(crate) fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_setting_ends_it_early() {
        assert_eq!(percent_encoded("p?s&d=/é 1"), "p%3Fs%26d%3D%2F%C3%A9%201");
        assert_eq!(quoted("a\"b"), "\"a\"\"b\"");
        assert_eq!(literal("a'b"), "'a''b'");
    }

    #[test]
    fn only_this_machine_is_local() {
        for (host, is_local) in
            [("localhost", true), ("127.0.0.1", true), ("::1", true), ("db.example", false), ("10.0.0.1", false)]
        {
            assert_eq!(Server::is_local(host), is_local, "{host}");
        }
    }
}
