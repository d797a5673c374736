//! Keys of pools and the files that they are in. A key is wiped from memory when it is dropped, and never printed.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ring::hmac;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::pool::PoolId;

/// Length of a key in bytes.
const KEY_SIZE: usize = 32;
/// Most keys of one pool: the one in use, and the one before it.
pub const MAX_KEYS: usize = 2;
/// Longest key file that is looked into: the key in hexadecimal digits, and a line end.
const MAX_FILE: usize = 2 * KEY_SIZE + 2;

/// Why a key file is not used.
#[derive(Debug, Error)]
pub enum KeyFileError {
    /// It cannot be read.
    #[error("key file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// It is a directory, a pipe or a device.
    #[error("key file {}: not a regular file", path.display())]
    NoFile {
        /// What was named.
        path: PathBuf,
    },
    /// Others than its owner may read or change it.
    #[error(
        "key file {}: its permissions are {mode:04o}, others than its owner have access; expected 0600 or 0400 (chmod 600)",
        path.display()
    )]
    Permissions {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Its content is no key.
    #[error(
        "key file {}: expected 32 random bytes, or 64 hexadecimal digits (openssl rand -hex 32), and found something else",
        path.display()
    )]
    Content {
        /// The file.
        path: PathBuf,
    },
}

/// A key of a pool.
#[derive(Clone)]
pub struct SecretKey(Zeroizing<[u8; KEY_SIZE]>);

impl SecretKey {
    /// The key that is these bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; KEY_SIZE]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Reads a file: 32 bytes as they are, or 64 hexadecimal digits and perhaps a line end.
    ///
    /// # Errors
    /// When it cannot be read, is no key, or others than its owner have access to it.
    pub fn read(path: &Path) -> Result<Self, KeyFileError> {
        let failed = |source| KeyFileError::Read { path: path.to_owned(), source };
        // To open a pipe waits for whoever writes to it, and to open a device may do things of its own: both would stop whoever
        // asks, and on a node every pool with it.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(KeyFileError::NoFile { path: path.to_owned() });
        }
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
        // Of the file that was opened: the name may mean another one by now.
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(KeyFileError::NoFile { path: path.to_owned() });
        }
        if metadata.mode() & 0o077 != 0 {
            return Err(KeyFileError::Permissions { path: path.to_owned(), mode: metadata.mode() & 0o7777 });
        }
        // Room for one byte more shows what is too long, and that nothing is moved, which would leave copies behind.
        let mut text = Zeroizing::new(Vec::with_capacity(MAX_FILE + 1));
        file.take(MAX_FILE as u64 + 1).read_to_end(&mut text).map_err(failed)?;
        Self::parse(&text).ok_or_else(|| KeyFileError::Content { path: path.to_owned() })
    }

    fn parse(text: &[u8]) -> Option<Self> {
        if let Ok(bytes) = <[u8; KEY_SIZE]>::try_from(text) {
            return Some(Self::from_bytes(bytes));
        }
        let digits = text.strip_suffix(b"\n").unwrap_or(text);
        let digits = digits.strip_suffix(b"\r").unwrap_or(digits);
        if digits.len() != 2 * KEY_SIZE {
            return None;
        }
        let mut bytes = Zeroizing::new([0; KEY_SIZE]);
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |c: u8| char::from(c).to_digit(16).and_then(|d| u8::try_from(d).ok());
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Self(bytes))
    }

    pub(super) fn hmac(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &*self.0)
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey")
    }
}

/// The keys of one pool: none, the one in use, or for the time of a rotation two.
#[derive(Clone, Default, Debug)]
pub struct KeyRing(Vec<SecretKey>);

impl KeyRing {
    /// The ring with these keys; those beyond [`MAX_KEYS`] are dropped.
    #[must_use]
    pub fn new(mut keys: Vec<SecretKey>) -> Self {
        keys.truncate(MAX_KEYS);
        Self(keys)
    }

    /// The ring with the key of one file.
    ///
    /// # Errors
    /// See [`SecretKey::read`].
    pub fn from_file(path: &Path) -> Result<Self, KeyFileError> {
        SecretKey::read(path).map(|key| Self(vec![key]))
    }

    /// The keys that a directory has for a pool: `NAME.key` and `NAME.key.old`, where the name is the pool's uuid or its name.
    /// What is not there is no key; what is there and cannot be used is an error, and never the same as no key.
    ///
    /// # Errors
    /// See [`SecretKey::read`].
    pub fn from_directory(directory: &Path, pool: PoolId, name: &str) -> Result<Self, KeyFileError> {
        let mut keys = Vec::new();
        for suffix in ["key", "key.old"] {
            for stem in [pool.to_string().as_str(), name] {
                let path = directory.join(format!("{stem}.{suffix}"));
                match SecretKey::read(&path) {
                    Ok(key) => {
                        keys.push(key);
                        break;
                    }
                    Err(KeyFileError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        // A directory that is gone would make every pool in it one without a key.
        if keys.is_empty() {
            let failed = |source| KeyFileError::Read { path: directory.to_owned(), source };
            std::fs::read_dir(directory).map_err(failed)?;
        }
        Ok(Self(keys))
    }

    /// Whether there is no key.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many keys there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Numbers by which two nodes are seen to have the same keys of a pool, and nothing else is: eight bytes of an HMAC, in
    /// hexadecimal digits.
    #[must_use]
    pub fn fingerprints(&self, pool: PoolId) -> Vec<String> {
        let of = |key: &SecretKey| {
            let text = [b"rmr key fingerprint".as_slice(), pool.as_bytes()].concat();
            let tag = hmac::sign(&key.hmac(), &text);
            tag.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
        };
        self.0.iter().map(of).collect()
    }

    pub(super) fn iter(&self) -> std::slice::Iter<'_, SecretKey> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn put(path: &Path, content: &[u8], mode: u32) {
        std::fs::write(path, content).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn bytes(ring: &KeyRing) -> Vec<[u8; KEY_SIZE]> {
        ring.iter().map(|key| *key.0).collect()
    }

    #[test]
    fn a_key_file_has_32_bytes_or_64_digits_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let digits = "0123456789abcdefABCDEF00112233445566778899aabbccddeeff0011223344";
        for good in [digits.to_owned(), format!("{digits}\n"), format!("{digits}\r\n")] {
            put(&path, good.as_bytes(), 0o600);
            assert_eq!(SecretKey::read(&path).unwrap().0[..4], [0x01, 0x23, 0x45, 0x67]);
        }
        put(&path, &[0xff; 32], 0o400);
        assert_eq!(*SecretKey::read(&path).unwrap().0, [0xff; 32]);
        let spoilt = digits.replace('7', "g");
        let bad: [&[u8]; 6] = [b"", &[1; 31], &[1; 33], spoilt.as_bytes(), &[b'a'; 63], &[b'a'; 4096]];
        for bad in bad {
            put(&path, bad, 0o600);
            assert!(matches!(SecretKey::read(&path), Err(KeyFileError::Content { .. })), "{bad:?}");
        }
    }

    #[test]
    fn a_key_file_that_others_may_read_or_write_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        for mode in [0o640, 0o604, 0o660, 0o620, 0o602, 0o610, 0o644] {
            put(&path, &[1; 32], mode);
            let error = SecretKey::read(&path).unwrap_err().to_string();
            assert!(error.contains(&format!("{mode:04o}")) && error.contains("expected 0600"), "{error}");
        }
        assert!(matches!(SecretKey::read(directory.path()), Err(KeyFileError::NoFile { .. })));
        // A pipe that nobody writes to, and a link to it.
        let (pipe, link) = (directory.path().join("pipe"), directory.path().join("link"));
        assert!(
            std::process::Command::new("mkfifo").args(["-m", "600"]).arg(&pipe).status().unwrap().success()
        );
        std::os::unix::fs::symlink(&pipe, &link).unwrap();
        for path in [pipe, link, "/dev/zero".into()] {
            assert!(matches!(SecretKey::read(&path), Err(KeyFileError::NoFile { .. })), "{}", path.display());
        }
    }

    #[test]
    fn fingerprints_tell_keys_and_pools_apart() {
        let ring =
            |bytes: &[u8]| KeyRing::new(bytes.iter().map(|&b| SecretKey::from_bytes([b; 32])).collect());
        let (pool, other) = (PoolId::from_bytes([7; 16]), PoolId::from_bytes([8; 16]));
        let both = ring(&[1, 2]).fingerprints(pool);
        assert_eq!((both.len(), both[0].len()), (2, 16));
        assert_ne!(both[0], both[1]);
        assert_eq!(ring(&[2]).fingerprints(pool), both[1..]);
        assert_ne!(ring(&[1, 2]).fingerprints(other), both);
    }

    #[test]
    fn a_directory_has_keys_by_uuid_or_name_the_new_one_first() {
        let directory = tempfile::tempdir().unwrap();
        let (path, pool) = (directory.path(), PoolId::random());
        let ring = |name| KeyRing::from_directory(path, pool, name);
        assert!(ring("vm-1").unwrap().is_empty());
        put(&path.join("vm-1.key.old"), &[1; 32], 0o600);
        assert_eq!(bytes(&ring("vm-1").unwrap()), [[1; 32]]);
        put(&path.join("vm-1.key"), &[2; 32], 0o600);
        assert_eq!(bytes(&ring("vm-1").unwrap()), [[2; 32], [1; 32]]);
        put(&path.join(format!("{pool}.key")), &[3; 32], 0o600);
        assert_eq!(bytes(&ring("vm-1").unwrap()), [[3; 32], [1; 32]]);
        assert_eq!(bytes(&ring("vm-2").unwrap()), [[3; 32]]);
    }

    #[test]
    fn a_key_that_cannot_be_used_is_not_the_same_as_none() {
        let directory = tempfile::tempdir().unwrap();
        let (path, pool) = (directory.path(), PoolId::random());
        put(&path.join("vm-1.key"), &[1; 32], 0o644);
        assert!(KeyRing::from_directory(path, pool, "vm-1").is_err());
        put(&path.join("vm-1.key"), b"short", 0o600);
        assert!(KeyRing::from_directory(path, pool, "vm-1").is_err());
        assert!(KeyRing::from_directory(&path.join("gone"), pool, "vm-1").is_err());
    }

    #[test]
    fn a_key_is_not_printed() {
        let text = format!("{:?}", KeyRing::new(vec![SecretKey::from_bytes([0xab; 32])]));
        assert_eq!(text, "KeyRing([SecretKey])");
    }
}
