//! What a benchmark ran on, and what its process took.

use serde::Serialize;

/// Memory in megabytes.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub memory_mb: f64,
    pub os: String,
}

/// The commit that this program was built from; `unknown` when it was built outside a repository.
pub const COMMIT: &str = env!("SHORI_COMMIT");

impl Machine {
    /// Reads what Linux tells; elsewhere the processor and the memory stay unknown.
    pub fn here() -> Self {
        let cpu = field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.into());
        let memory_mb = field("/proc/meminfo", "MemTotal").and_then(|text| megabytes(&text)).unwrap_or(0.0);
        let name = quoted("/etc/os-release", "PRETTY_NAME=").unwrap_or_else(|| std::env::consts::OS.into());
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let os = format!("{name} {}", kernel.trim()).trim_end().to_string();
        Self { cpu, cores: std::thread::available_parallelism().map_or(1, usize::from), memory_mb, os }
    }
}

/// Most resident memory that this process had, in megabytes (Linux: VmHWM; elsewhere 0).
pub fn peak_resident_mb() -> f64 {
    field("/proc/self/status", "VmHWM").and_then(|text| megabytes(&text)).unwrap_or(0.0)
}

/// Linux counts processor time in hundredths of a second, whatever its clock.
const TICKS_PER_SECOND: f64 = 100.0;

/// Processor time that this process has taken, of all its threads, in seconds (elsewhere than on Linux 0).
pub fn processor_seconds() -> f64 {
    processor_seconds_of("self").unwrap_or(0.0)
}

/// The same of another process, by its id; `None` when it has gone.
pub fn processor_seconds_of(process: &str) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The program's name stands in parentheses and may hold spaces; utime and stime are the 12th and 13th field after.
    let (_, after_name) = text.rsplit_once(')')?;
    let ticks = after_name.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok());
    Some(ticks.sum::<f64>() / TICKS_PER_SECOND)
}

/// What else runs here, in cores (Linux: the load of the last minute; elsewhere 0).
pub fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0)
}

/// The value of the first line `name : value`.
fn field(file: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.into_iter().find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_string())
}

fn quoted(file: &str, prefix: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(prefix))?;
    Some(value.trim_matches('"').to_string())
}

/// `1024 kB` is 1.048576 megabytes.
fn megabytes(kibibytes: &str) -> Option<f64> {
    let number: f64 = kibibytes.trim_end_matches("kB").trim().parse().ok()?;
    Some(number * 1024.0 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kibibytes_become_megabytes() {
        assert_eq!(megabytes("1000 kB"), Some(1.024));
        assert_eq!(megabytes("many"), None);
    }

    #[test]
    fn work_takes_processor_time() {
        let begun = std::time::Instant::now();
        while cfg!(target_os = "linux") && processor_seconds() < 0.02 {
            assert!(begun.elapsed().as_secs() < 60, "no time is counted");
        }
    }

    #[test]
    fn this_machine_has_a_core_and_a_commit() {
        assert!(Machine::here().cores >= 1);
        assert!(!COMMIT.is_empty());
    }
}
