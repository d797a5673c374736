//! The pool specification: what stays the same while views change, and the limits of a pool.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Block, Chunk, MemberId, MemberSet, MemberState, MemberView, PoolId, StoreId, View};

/// Most members that a pool may have: one byte of [`MemberSet`], one dirty map each on disk.
pub const MAX_MEMBERS: usize = 8;
/// Size of a block in bytes: the unit of dirty tracking in memory and of atomicity after a crash.
pub const BLOCK_SIZE: u64 = 4096;
/// Smallest chunk in bytes.
pub const MIN_CHUNK_SIZE: u64 = 64 << 10;
/// Largest chunk in bytes.
pub const MAX_CHUNK_SIZE: u64 = 64 << 20;
/// Longest pool name in bytes.
pub const MAX_NAME_LENGTH: usize = 64;
/// Longest member address in bytes, scheme included.
const MAX_ADDRESS_LENGTH: usize = 128;
/// Largest pool in bytes: 1 PiB, for which maps at the largest chunk are still 2 MiB each.
pub const MAX_POOL_SIZE: u64 = 1 << 50;

/// Size of a chunk: a power of two from 64 KiB to 64 MiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct ChunkSize(u32);

impl ChunkSize {
    /// A chunk size of `bytes`.
    ///
    /// # Errors
    /// When `bytes` is no power of two between 64 KiB and 64 MiB.
    pub fn from_bytes(bytes: u64) -> Result<Self, SpecError> {
        if !bytes.is_power_of_two() || !(MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&bytes) {
            return Err(SpecError::ChunkSize { found: bytes });
        }
        Ok(Self(bytes.trailing_zeros()))
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// The binary logarithm of the size in bytes.
    #[must_use]
    pub const fn shift(self) -> u32 {
        self.0
    }

    /// The chunk that holds the byte at `offset`.
    #[must_use]
    pub const fn chunk_of(self, offset: u64) -> Chunk {
        Chunk(offset >> self.0)
    }

    /// The chunk that holds `block`.
    #[must_use]
    pub const fn chunk_of_block(self, block: Block) -> Chunk {
        Chunk((block.0 * BLOCK_SIZE) >> self.0)
    }

    /// How many chunks a pool of `size` bytes has; the last one may be partial.
    #[must_use]
    pub const fn count(self, size: u64) -> u64 {
        size.div_ceil(self.bytes())
    }
}

impl Default for ChunkSize {
    /// 1 MiB.
    fn default() -> Self {
        Self(20)
    }
}

impl TryFrom<u64> for ChunkSize {
    type Error = SpecError;

    fn try_from(bytes: u64) -> Result<Self, Self::Error> {
        Self::from_bytes(bytes)
    }
}

impl From<ChunkSize> for u64 {
    fn from(size: ChunkSize) -> Self {
        size.bytes()
    }
}

/// Which binding carries the messages of a leg.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransportKind {
    /// Plain TCP.
    Tcp,
    /// TLS 1.3 over TCP.
    Tls,
    /// Reliable connections of RDMA verbs.
    Rdma,
}

impl TransportKind {
    /// How far it keeps others out of the connection; more is better. TLS encrypts and proves the node; a network of RDMA is
    /// reached by those with a card in it; plain TCP protects nothing.
    const fn protection(self) -> u8 {
        match self {
            Self::Tcp => 0,
            Self::Rdma => 1,
            Self::Tls => 2,
        }
    }

    /// Whether a change from `before` to this one takes protection away.
    #[must_use]
    pub const fn is_weaker_than(self, before: Self) -> bool {
        self.protection() < before.protection()
    }
}

impl fmt::Display for TransportKind {
    /// The scheme of addresses of this kind.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Rdma => "rdma",
        })
    }
}

/// Where a node listens for clients and peers: `tcp://host:port`, `tls://host:port` or `rdma://host:port`.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address {
    transport: TransportKind,
    host: String,
    port: u16,
}

impl Address {
    /// An address on TCP. `host` is a name, an IPv4 address, or an IPv6 address without brackets.
    #[must_use]
    pub fn tcp(host: impl Into<String>, port: u16) -> Self {
        Self::new(TransportKind::Tcp, host, port)
    }

    /// An address. `host` is a name, an IPv4 address, or an IPv6 address without brackets.
    #[must_use]
    pub fn new(transport: TransportKind, host: impl Into<String>, port: u16) -> Self {
        Self { transport, host: host.into(), port }
    }

    /// The binding to use.
    #[must_use]
    pub const fn transport(&self) -> TransportKind {
        self.transport
    }

    /// Host name or numeric address, IPv6 without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Port number.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }
}

/// Why a text is no [`Address`].
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error(
    "'{text}' is no address: {reason}; expected HOST:PORT, tcp://HOST:PORT, tls://HOST:PORT or rdma://HOST:PORT"
)]
pub struct AddressError {
    text: String,
    reason: &'static str,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = |reason| AddressError { text: text.to_owned(), reason };
        let (transport, rest) = match text.split_once("://") {
            None => (TransportKind::Tcp, text),
            Some(("tcp", rest)) => (TransportKind::Tcp, rest),
            Some(("tls", rest)) => (TransportKind::Tls, rest),
            Some(("rdma", rest)) => (TransportKind::Rdma, rest),
            Some(_) => return Err(fail("the scheme is neither tcp nor tls nor rdma")),
        };
        let (host, port) = rest.rsplit_once(':').ok_or_else(|| fail("the port is missing"))?;
        let host = match host.strip_prefix('[') {
            Some(inner) => inner.strip_suffix(']').ok_or_else(|| fail("the bracket is not closed"))?,
            None if host.contains(':') => return Err(fail("an IPv6 address needs brackets")),
            None => host,
        };
        if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c == '/') {
            return Err(fail("the host is empty or has white space or a slash"));
        }
        let port = port.parse().map_err(|_| fail("the port is not a number from 0 to 65535"))?;
        let address = Self { transport, host: host.to_owned(), port };
        // With its scheme, as it stands in messages and on disk.
        if address.to_string().len() > MAX_ADDRESS_LENGTH {
            return Err(fail("with its scheme it is longer than 128 bytes"));
        }
        Ok(address)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = self.transport;
        if self.host.contains(':') {
            write!(f, "{scheme}://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{scheme}://{}:{}", self.host, self.port)
        }
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

/// One member of a pool: which store it is and where its node listens.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemberSpec {
    /// Index of the member in the pool.
    pub id: MemberId,
    /// The store that is this member.
    pub store: StoreId,
    /// Where the node that holds the store listens for clients and peers.
    pub address: Address,
    /// The operator wants the member to be Out: nobody brings it back in while this is set.
    pub maintenance: bool,
}

impl MemberSpec {
    /// A member that is not in maintenance.
    #[must_use]
    pub const fn new(id: MemberId, store: StoreId, address: Address) -> Self {
        Self { id, store, address, maintenance: false }
    }
}

/// What a pool is, apart from the state of its members.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PoolSpec {
    /// Identity of the pool.
    pub id: PoolId,
    /// Name for people: 1 to 64 of `A-Z a-z 0-9 . _ -`, starting with a letter or digit.
    pub name: String,
    /// Size in bytes, a multiple of [`BLOCK_SIZE`].
    pub size: u64,
    /// Unit of dirty tracking on disk.
    pub chunk_size: ChunkSize,
    /// Smallest write in bytes, 512 or 4096: the logical block size that guests see.
    pub logical_block_size: u32,
    /// The members, ordered by id.
    pub members: Vec<MemberSpec>,
}

/// Why a [`PoolSpec`] is refused.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum SpecError {
    /// The chunk size is no power of two in range.
    #[error("chunk size {found} bytes: expected a power of two from 65536 (64 KiB) to 67108864 (64 MiB)")]
    ChunkSize {
        /// What was given, in bytes.
        found: u64,
    },
    /// The pool size is zero, not whole blocks, or too large.
    #[error("pool size {found} bytes: expected a multiple of 4096, from 1 MiB to 1 PiB")]
    Size {
        /// What was given, in bytes.
        found: u64,
    },
    /// The logical block size is neither 512 nor 4096.
    #[error("logical block size {found}: expected 512 or 4096")]
    LogicalBlockSize {
        /// What was given, in bytes.
        found: u32,
    },
    /// The name is empty, too long, or has other characters.
    #[error(
        "pool name '{found}': expected 1 to 64 of A-Z a-z 0-9 . _ - , starting with a letter or digit, and no uuid"
    )]
    Name {
        /// What was given.
        found: String,
    },
    /// There are no members or more than [`MAX_MEMBERS`].
    #[error("{found} members: expected 1 to 8")]
    MemberCount {
        /// How many were given.
        found: usize,
    },
    /// Two members have the same id, store or address, or ids are not in order.
    #[error("member {member}: its id, store or address is given twice, or members are not ordered by id")]
    DuplicateMember {
        /// The second one of the pair.
        member: MemberId,
    },
}

impl PoolSpec {
    /// Checks every limit that a specification has to keep.
    ///
    /// # Errors
    /// The first limit that is broken.
    pub fn validate(&self) -> Result<(), SpecError> {
        Self::validate_name(&self.name)?;
        if !self.size.is_multiple_of(BLOCK_SIZE) || !(1 << 20..=MAX_POOL_SIZE).contains(&self.size) {
            return Err(SpecError::Size { found: self.size });
        }
        if !matches!(self.logical_block_size, 512 | 4096) {
            return Err(SpecError::LogicalBlockSize { found: self.logical_block_size });
        }
        if !(1..=MAX_MEMBERS).contains(&self.members.len()) {
            return Err(SpecError::MemberCount { found: self.members.len() });
        }
        for (i, member) in self.members.iter().enumerate() {
            let clash = |other: &MemberSpec| {
                other.id >= member.id || other.store == member.store || other.address == member.address
            };
            if self.members[..i].iter().any(clash) {
                return Err(SpecError::DuplicateMember { member: member.id });
            }
        }
        Ok(())
    }

    /// Checks the rules for names alone.
    ///
    /// # Errors
    /// [`SpecError::Name`].
    pub fn validate_name(name: &str) -> Result<(), SpecError> {
        let first_ok = name.starts_with(|c: char| c.is_ascii_alphanumeric());
        let all_ok = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        // A name that reads as a uuid would make `NAME|UUID` arguments ambiguous.
        let ambiguous = uuid::Uuid::parse_str(name).is_ok();
        if first_ok && all_ok && !ambiguous && name.len() <= MAX_NAME_LENGTH {
            Ok(())
        } else {
            Err(SpecError::Name { found: name.to_owned() })
        }
    }

    /// Whether both are the same pool, with what never changes: only size and members may differ. The name never changes
    /// either: a client that could rename its pool could take the name of another one.
    #[must_use]
    pub fn is_same_pool(&self, other: &Self) -> bool {
        self.id == other.id
            && self.name == other.name
            && self.chunk_size == other.chunk_size
            && self.logical_block_size == other.logical_block_size
    }

    /// The member whose store `next` has at an address with less protection, with both addresses.
    #[must_use]
    pub fn weakened_in<'a>(&'a self, next: &'a Self) -> Option<(MemberId, &'a Address, &'a Address)> {
        next.members.iter().find_map(|new| {
            let old = &self.members.iter().find(|m| m.store == new.store)?.address;
            new.address.transport().is_weaker_than(old.transport()).then_some((new.id, old, &new.address))
        })
    }

    /// Whether it goes with this view: the same members with the same stores, and those in maintenance are Out.
    #[must_use]
    pub fn describes(&self, view: &View) -> bool {
        let fits = |(m, v): (&MemberSpec, &MemberView)| {
            m.id == v.id && m.store == v.store && (!m.maintenance || v.state == MemberState::Out)
        };
        self.members.len() == view.members.len() && self.members.iter().zip(&view.members).all(fits)
    }

    /// The member with this id.
    #[must_use]
    pub fn member(&self, id: MemberId) -> Option<&MemberSpec> {
        self.members.iter().find(|m| m.id == id)
    }

    /// The ids of all members.
    #[must_use]
    pub fn member_set(&self) -> MemberSet {
        self.members.iter().map(|m| m.id).collect()
    }

    /// How many 4 KiB blocks the pool has.
    #[must_use]
    pub const fn block_count(&self) -> u64 {
        self.size / BLOCK_SIZE
    }

    /// How many chunks the pool has; the last one may be partial.
    #[must_use]
    pub const fn chunk_count(&self) -> u64 {
        self.chunk_size.count(self.size)
    }
}

impl fmt::Display for PoolSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (chunk, block) = (self.chunk_size.bytes(), self.logical_block_size);
        write!(f, "pool {} ('{}') with chunks of {chunk} bytes and blocks of {block}", self.id, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> PoolSpec {
        let member = |id, port| {
            MemberSpec::new(MemberId::new(id).unwrap(), StoreId::random(), Address::tcp("127.0.0.1", port))
        };
        PoolSpec {
            id: PoolId::random(),
            name: "vm-1".into(),
            size: 64 << 20,
            chunk_size: ChunkSize::default(),
            logical_block_size: 512,
            members: vec![member(0, 1), member(1, 2)],
        }
    }

    #[test]
    fn a_good_spec_is_accepted() {
        assert_eq!(spec().validate(), Ok(()));
    }

    #[test]
    fn a_pool_stays_the_same_with_another_size_or_other_members_and_with_nothing_else() {
        let pool = spec();
        let is_same = |change: fn(&mut PoolSpec)| {
            let mut other = pool.clone();
            change(&mut other);
            pool.is_same_pool(&other)
        };
        assert!(is_same(|s| s.size *= 2) && is_same(|s| s.members.truncate(1)));
        assert!(!is_same(|s| s.id = PoolId::random()));
        assert!(!is_same(|s| s.name = "vm-2".into()));
        assert!(!is_same(|s| s.chunk_size = ChunkSize::from_bytes(64 << 10).unwrap()));
        assert!(!is_same(|s| s.logical_block_size = 4096));
    }

    #[test]
    fn each_broken_limit_is_named() {
        let broken = |change: fn(&mut PoolSpec)| {
            let mut s = spec();
            change(&mut s);
            s.validate().unwrap_err()
        };
        assert!(matches!(broken(|s| s.size = 4095), SpecError::Size { found: 4095 }));
        assert!(matches!(broken(|s| s.size = 0), SpecError::Size { .. }));
        assert!(matches!(broken(|s| s.size = 1 << 51), SpecError::Size { .. }));
        assert!(matches!(broken(|s| s.name = String::new()), SpecError::Name { .. }));
        assert!(matches!(broken(|s| s.name = "a/b".into()), SpecError::Name { .. }));
        assert!(matches!(broken(|s| s.name = "x".repeat(65)), SpecError::Name { .. }));
        assert!(matches!(broken(|s| s.name = s.id.to_string()), SpecError::Name { .. }));
        assert!(matches!(broken(|s| s.logical_block_size = 1024), SpecError::LogicalBlockSize { .. }));
        assert!(matches!(broken(|s| s.members.clear()), SpecError::MemberCount { found: 0 }));
        assert!(matches!(broken(|s| s.members.swap(0, 1)), SpecError::DuplicateMember { .. }));
        assert!(matches!(
            broken(|s| s.members[1].store = s.members[0].store),
            SpecError::DuplicateMember { .. }
        ));
    }

    #[test]
    fn chunk_sizes_are_powers_of_two_in_range() {
        assert_eq!(ChunkSize::from_bytes(1 << 20).unwrap(), ChunkSize::default());
        for bad in [0, 1, 32 << 10, 100 << 10, 128 << 20] {
            assert_eq!(ChunkSize::from_bytes(bad), Err(SpecError::ChunkSize { found: bad }));
        }
        let size = ChunkSize::from_bytes(64 << 10).unwrap();
        assert_eq!(size.chunk_of(65535), Chunk(0));
        assert_eq!(size.chunk_of(65536), Chunk(1));
        assert_eq!(size.chunk_of_block(Block(16)), Chunk(1));
        assert_eq!(size.count((64 << 10) + 1), 2);
    }

    #[test]
    fn a_store_whose_address_loses_protection_is_found_and_one_that_gains_it_is_not() {
        let with = |address: &str| {
            let mut spec = spec();
            (spec.members[0].store, spec.members[1].store) =
                (StoreId::from_bytes([1; 16]), StoreId::from_bytes([2; 16]));
            spec.members[1].address = address.parse().unwrap();
            spec
        };
        let table = [
            ("tls://a:1", "tcp://a:1", true),
            ("tls://a:1", "rdma://a:1", true),
            ("rdma://a:1", "tcp://a:1", true),
            ("tls://a:1", "tls://b:1", false),
            ("tcp://a:1", "rdma://a:1", false),
            ("rdma://a:1", "tls://a:1", false),
        ];
        for (old, new, is_weaker) in table {
            let (old, new) = (with(old), with(new));
            assert_eq!(old.weakened_in(&new).map(|(m, ..)| m), is_weaker.then_some(old.members[1].id));
        }
        let mut replaced = with("tcp://a:1");
        replaced.members[1].store = StoreId::random();
        assert_eq!(with("tls://a:1").weakened_in(&replaced), None, "another store");
    }

    #[test]
    fn addresses_read_and_print() {
        for (text, printed) in [
            ("node-a:7700", "tcp://node-a:7700"),
            ("tcp://10.0.0.1:1", "tcp://10.0.0.1:1"),
            ("tls://node-a:7702", "tls://node-a:7702"),
            ("rdma://[fe80::1]:7700", "rdma://[fe80::1]:7700"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), printed);
            assert_eq!(printed.parse::<Address>().unwrap(), address);
        }
        let longest = format!("{}:7700", "h".repeat(128 - "tcp://:7700".len()));
        assert_eq!(longest.parse::<Address>().unwrap().to_string().len(), 128);
        assert!(format!("h{longest}").parse::<Address>().is_err());
        for bad in ["", "host", "host:", "host:70000", "http://h:1", "::1:7700", "[::1:7700", ":1", "a b:1"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
