//! TLS, with certificates of an authority of the test's own.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use shori_core::ErrorKind;
use shori_core::secret::Secret;
use shori_postgres::Tls;
use tempfile::TempDir;

use crate::harness::Reader;
use crate::server::{SCRAM_PASSWORD, SCRAM_USER, Server};

const ITEMS: &str = "create table items (id bigint primary key, name text); insert into items values (1, 'a')";

/// `authority.pem`, and `server.pem` with `server.key` for what `names` says.
fn certificates(names: &str) -> TempDir {
    let folder = TempDir::new().unwrap();
    let readable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(folder.path(), readable).unwrap();
    // A key may be read by its owner alone, who is the server's user.
    let script = format!(
        "set -e
        new='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2'
        openssl req -x509 $new -keyout authority.key -out authority.pem -subj '/CN=the authority of {names}'
        openssl req $new -keyout server.key -out server.csr -subj '/CN=a server'
        printf 'subjectAltName={names}\\nbasicConstraints=CA:FALSE\\n' > names
        openssl x509 -req -in server.csr -CA authority.pem -CAkey authority.key -CAcreateserial -days 2 -extfile names -out server.pem
        chmod 600 server.key
        if [ \"$(id -u)\" = 0 ]; then chown postgres: server.key; fi"
    );
    let made = Command::new("sh").args(["-c", &script]).current_dir(folder.path()).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    folder
}

fn server(certificates: &Path) -> Server {
    let file = |name: &str| certificates.join(name).display().to_string();
    let (certificate, key) = (file("server.pem"), file("server.key"));
    Server::start(&[("ssl", "on"), ("ssl_cert_file", &certificate), ("ssl_key_file", &key)])
}

async fn reader(server: &Server, roots: PathBuf) -> Reader {
    let database = server.create_database().await;
    let mut reader = Reader::over(server, &database, ITEMS, &["items"]).await;
    reader.config.server.tls = Tls::Verified { roots: Some(roots) };
    reader
}

#[tokio::test(flavor = "multi_thread")]
async fn both_connections_are_encrypted_and_log_in_by_scram() {
    let certificates = certificates("IP:127.0.0.1");
    let server = server(certificates.path());
    let mut reader = reader(&server, certificates.path().join("authority.pem")).await;
    reader.sql(&format!("grant pg_read_all_data to {SCRAM_USER}; create publication shori for table items")).await;
    reader.config.server.user = SCRAM_USER.into();
    reader.config.server.password = Some(Secret::new(SCRAM_PASSWORD));
    reader.start().await;
    reader.read().await;
    reader.sql("insert into items select n, repeat('x', 5000) from generate_series(2, 500) as n").await;
    reader.read().await;
    reader.assert_equal("items").await;
    let sessions = format!(
        "select count(*), bool_and(ssl), count(*) filter (where backend_type = 'walsender')
        from pg_stat_ssl join pg_stat_activity using (pid) where usename = '{SCRAM_USER}'"
    );
    assert_eq!(reader.printed(&sessions).await, [[Some("2".into()), Some("t".into()), Some("1".into())]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_be_verified_is_refused() {
    let (own, other) = (certificates("IP:127.0.0.1"), certificates("DNS:db.example"));
    let right = server(own.path());
    // Of another authority; or named otherwise.
    let named = server(other.path());
    for (server, roots, cause) in [(&right, &other, "UnknownIssuer"), (&named, &other, "not valid for name")] {
        let mut reader = reader(server, roots.path().join("authority.pem")).await;
        let error = reader.try_start().await.unwrap_err();
        assert!(error.to_string().contains(cause), "{error}");
        assert_ne!(error.kind(), ErrorKind::Internal, "{error}");
        assert!(reader.log("items").is_empty());
    }
    let mut reader = reader(&right, own.path().join("none.pem")).await;
    let error = reader.try_start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
    assert!(error.to_string().contains("none.pem"), "{error}");
}
