//! One writer per output: a lock beside it, as long as the run lasts.

use anyhow::{Context, bail, ensure};
use std::{
    fs::{self, File, TryLockError},
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
    process,
    time::SystemTime,
};

/// An exclusive lock of the file `OUTPUT.lock`, which tells who holds it. A file that a killed run has left behind is no
/// obstacle, because the system has released its lock.
pub(super) struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Locks `output`. Returns `None` for what is no file, such as a pipe: nothing there can be overwritten.
    ///
    /// # Errors
    ///
    /// An error that says who holds the lock if another run does.
    pub(super) fn of(output: &Path) -> anyhow::Result<Option<Self>> {
        if output.exists() && !output.is_file() {
            return Ok(None);
        }
        // Another name of the same file has the same lock.
        let output = &behind_links(output);
        let mut path = output.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        loop {
            let open = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path);
            let mut file = open.with_context(|| format!("cannot write to {}", path.display()))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut holder = String::new();
                    let _ = file.take(1_000).read_to_string(&mut holder);
                    let holder = holder.trim();
                    let holder = if holder.is_empty() { "not known yet" } else { holder };
                    bail!("another run writes to {}: {holder}", output.display());
                }
                // Some network file systems have no locks. A run there is not guarded, as without this file.
                Err(TryLockError::Error(_)) => return Ok(None),
            }
            // Another run may have removed the file between opening and locking it, so that a third one would lock a
            // new file of the same name.
            if !is_same(&file, &path) {
                continue;
            }
            let mut earlier = String::new();
            let is_foreign = (&file).take(1_000).read_to_string(&mut earlier).is_err()
                || !(earlier.is_empty() || earlier.starts_with("process "));
            // A lock file of another program, as of a package manager, may have the same name.
            ensure!(
                !is_foreign,
                "{} is needed as a lock, and holds something else: --output names another",
                path.display()
            );
            let holder = format!("process {} on {}, since {}\n", process::id(), host(), now());
            let written = file
                .set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| file.write_all(holder.as_bytes()));
            written.with_context(|| format!("cannot write to {}", path.display()))?;
            return Ok(Some(Self { file, path }));
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Removed while it is locked, so that it is not the file of a later run.
        let _ = fs::remove_file(&self.path);
        let _ = self.file.unlock();
    }
}

/// Returns the file that a link leads to, also one that does not exist yet.
fn behind_links(output: &Path) -> PathBuf {
    // The number of links that Linux follows.
    const MAX_LINKS: usize = 40;
    let mut path = output.to_owned();
    for _ in 0..MAX_LINKS {
        let Ok(target) = fs::read_link(&path) else { break };
        // A relative target begins in the folder of the link.
        path = path.parent().unwrap_or_else(|| Path::new("")).join(target);
    }
    path.canonicalize().unwrap_or(path)
}

#[cfg(unix)]
fn is_same(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let of_file = file.metadata().map(id).ok();
    of_file.is_some() && of_file == fs::metadata(path).map(id).ok()
}

#[cfg(not(unix))]
fn is_same(_: &File, _: &Path) -> bool {
    // A file that is open cannot be removed.
    true
}

fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = name.or_else(|| std::env::var("HOSTNAME").ok());
    let name = name.or_else(|| std::env::var("COMPUTERNAME").ok());
    name.map_or_else(|| "this host".into(), |name| name.trim().to_owned())
}

fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_run_is_refused_with_who_holds_the_output() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out.jsonl");
        let lock = Lock::of(&output).unwrap();
        let refused = Lock::of(&output).err().unwrap().to_string();
        assert!(refused.contains(&format!("process {} on ", process::id())), "{refused}");
        drop(lock);
        assert!(!folder.path().join("out.jsonl.lock").exists());
        assert!(Lock::of(&output).unwrap().is_some());
    }

    #[test]
    fn the_file_of_a_run_that_was_killed_is_no_obstacle() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("out.jsonl.lock"), "process 1 on a, since b\n").unwrap();
        assert!(Lock::of(&folder.path().join("out.jsonl")).unwrap().is_some());
    }

    #[cfg(unix)]
    #[test]
    fn a_link_has_the_lock_of_its_file_also_before_the_file_exists() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link.jsonl");
        std::os::unix::fs::symlink("out.jsonl", &link).unwrap();
        let _lock = Lock::of(&link).unwrap();
        fs::write(folder.path().join("out.jsonl"), "").unwrap();
        assert!(Lock::of(&link).is_err());
        assert!(Lock::of(&folder.path().join("out.jsonl")).is_err());
    }

    #[test]
    fn a_file_of_another_program_is_not_used_as_a_lock() {
        let folder = tempfile::tempdir().unwrap();
        let foreign = folder.path().join("packages.lock");
        fs::write(&foreign, "version = 4\n").unwrap();
        assert!(Lock::of(&folder.path().join("packages")).is_err());
        assert_eq!(fs::read_to_string(&foreign).unwrap(), "version = 4\n");
    }

    #[cfg(unix)]
    #[test]
    fn a_device_is_not_locked() {
        assert!(Lock::of(Path::new("/dev/null")).unwrap().is_none());
    }
}
