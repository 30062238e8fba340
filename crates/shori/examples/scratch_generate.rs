use std::sync::atomic::AtomicBool;
fn main() {
    let mut args = std::env::args().skip(1);
    let path: std::path::PathBuf = args.next().unwrap().into();
    let changes: u64 = args.next().unwrap().parse().unwrap();
    let rate: Option<f64> = args.next().map(|r| r.parse().unwrap());
    if !path.exists() {
        rusqlite::Connection::open(&path)
            .unwrap()
            .execute_batch(include_str!("../../../pipelines/demo/sql/sample_source.sql"))
            .unwrap();
    }
    let config = shori::generate::GenerateConfig { changes: Some(changes), rate, ..shori::generate::GenerateConfig::new(path) };
    println!("{}", shori::generate::run(&config, &AtomicBool::new(false), |_| {}).unwrap());
}
