//! A disk that is soon full.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Mounted on a folder until dropped.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None`, and a word of it, where this process may not mount one.
    pub fn mount(path: &Path, mib: u32) -> Option<Self> {
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"]).arg(path).output();
        if !mounted.is_ok_and(|output| output.status.success()) {
            println!("skipped: this process may not mount a small file system");
            return None;
        }
        Some(Self(path.to_path_buf()))
    }

    pub fn resize(&self, mib: u32) {
        let mut mount = Command::new("mount");
        assert!(mount.args(["-o", &format!("remount,size={mib}m")]).arg(&self.0).status().unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
