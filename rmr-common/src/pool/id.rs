//! Newtypes for identities and units, so that a block is never taken for a chunk nor an epoch for a view.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::MAX_MEMBERS;

macro_rules! uuid_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new random identity.
            #[must_use]
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// The 16 bytes of the identity, in the order of RFC 9562.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }

            /// The identity that these 16 bytes name.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

uuid_type! {
    /// Identity of a pool. Names are for people; this is what is compared.
    PoolId
}
uuid_type! {
    /// Identity of one store: the disk or file under a member. A replaced disk is a new store.
    StoreId
}
uuid_type! {
    /// Identity of a client (a daemon or a program that attaches to pools).
    ClientId
}
uuid_type! {
    /// Identity of one run of a kernel or of a process; it changes exactly when memory was lost.
    BootId
}

macro_rules! number_type {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The number after this one.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

number_type! {
    /// Number of a client attachment. Grows with every attach; lower ones are fenced.
    Epoch(u64)
}
number_type! {
    /// Number of a view. Grows by one with every step.
    ViewNumber(u64)
}
number_type! {
    /// Order of a write within its epoch, from 1. Zero means "none yet".
    Sequence(u64)
}
number_type! {
    /// Counts the points of an attachment that every active member has on durable record. Zero means "none yet".
    Mark(u64)
}
number_type! {
    /// Index of a client's request slot; at most one request occupies a slot at a time.
    Slot(u16)
}
number_type! {
    /// Index of a 4 KiB block of the pool: the unit of dirty tracking in memory.
    Block(u64)
}
number_type! {
    /// Index of a chunk of the pool: the unit of dirty tracking on disk.
    Chunk(u64)
}

/// Most that an epoch, a view number or a sequence may be which another party names. It leaves room for whatever is added
/// to one, so nobody can make it overflow.
pub const MAX_NUMBER: u64 = u64::MAX - (1 << 40);

/// Index of a member in its pool, `0..MAX_MEMBERS`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct MemberId(u8);

impl MemberId {
    /// The member with this index, or `None` when `index` is not below [`MAX_MEMBERS`].
    #[must_use]
    pub fn new(index: u8) -> Option<Self> {
        (usize::from(index) < MAX_MEMBERS).then_some(Self(index))
    }

    /// All possible member ids, in order.
    pub fn all() -> impl Iterator<Item = Self> {
        (0u8..).map(Self).take(MAX_MEMBERS)
    }

    /// The index, `0..MAX_MEMBERS`.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The index as it stands in messages and on disk.
    #[must_use]
    pub const fn as_u8(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for MemberId {
    type Error = String;

    fn try_from(index: u8) -> Result<Self, Self::Error> {
        Self::new(index).ok_or_else(|| format!("member id {index} is not below {MAX_MEMBERS}"))
    }
}

impl From<MemberId> for u8 {
    fn from(id: MemberId) -> Self {
        id.0
    }
}

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemberId({})", self.0)
    }
}

/// A set of members, one bit per [`MemberId`].
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MemberSet(pub u8);

impl MemberSet {
    /// The set with no member.
    pub const EMPTY: Self = Self(0);

    /// The set with only `member`.
    #[must_use]
    pub const fn only(member: MemberId) -> Self {
        Self(1 << member.0)
    }

    /// Whether `member` is in the set.
    #[must_use]
    pub const fn contains(self, member: MemberId) -> bool {
        self.0 & (1 << member.0) != 0
    }

    /// Adds `member`.
    pub const fn insert(&mut self, member: MemberId) {
        self.0 |= 1 << member.0;
    }

    /// Takes `member` out; true if it was there.
    pub const fn remove(&mut self, member: MemberId) -> bool {
        let was = self.contains(member);
        self.0 &= !(1 << member.0);
        was
    }

    /// Whether no member is in the set.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many members are in the set.
    #[must_use]
    pub const fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// Members of either set.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Members of this set that are not in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Members of both sets.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether every member of this set is in `other`.
    #[must_use]
    pub const fn is_subset(self, other: Self) -> bool {
        self.without(other).is_empty()
    }

    /// The members, lowest id first.
    pub fn iter(self) -> impl Iterator<Item = MemberId> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            let first = MemberId::new(u8::try_from(left.trailing_zeros()).ok()?)?;
            left &= left - 1;
            Some(first)
        })
    }
}

impl FromIterator<MemberId> for MemberSet {
    fn from_iter<I: IntoIterator<Item = MemberId>>(members: I) -> Self {
        let mut set = Self::EMPTY;
        for member in members {
            set.insert(member);
        }
        set
    }
}

impl fmt::Display for MemberSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (i, member) in self.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{member}")?;
        }
        f.write_str("}")
    }
}

impl fmt::Debug for MemberSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemberSet{self}")
    }
}
