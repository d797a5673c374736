//! The superblock: what a store knows of itself, its pool and its last client, in 4096 bytes that check themselves.
//! `docs/on-disk-format.md` has the layout byte by byte.

use rmr_common::pool::{
    Address, Attested, ChunkSize, ClientId, Epoch, MAX_MEMBERS, MAX_NAME_LENGTH, Mark, MemberId, MemberSet,
    MemberSpec, MemberState, MemberView, PoolId, PoolSpec, Position, SpecError, StoreId, View, ViewError,
    ViewNumber,
};
use serde::Serialize;
use thiserror::Error;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::layout::{Layout, PAGE_SIZE};
use super::page::{page_checksum, slot_of};
use crate::disk::AlignedPage;

/// First bytes of every superblock.
pub(super) const SUPERBLOCK_MAGIC: [u8; 8] = *b"RMRSTORE";
/// The format that this program writes, and the newest that it reads. Version 1 is version 2 with nothing in the history fields; a
/// store in it is version 2 from its next open on.
pub const FORMAT_VERSION: u32 = 2;
/// The oldest format that it reads.
const OLDEST_VERSION: u32 = 1;
/// Longest text that names a client, in bytes.
pub const MAX_CLIENT_NAME: usize = 128;
/// Longest member address in bytes, as printed with its scheme.
pub(super) const MAX_ADDRESS: usize = 128;

const FLAG_CLEAN: u8 = 1;
const FLAG_WRITE_THROUGH: u8 = 2;
const FLAG_CLIENT_KNOWN: u8 = 4;
const FLAG_CLIENT_ATTACHED: u8 = 8;
const FLAG_FLUSH_FAILED: u8 = 16;

/// In the flags of a member.
const FLAG_MAINTENANCE: u8 = 1;

/// The last client that this store accepted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ClientRecord {
    /// Who it is.
    pub id: ClientId,
    /// Its host and process, for people; at most [`MAX_CLIENT_NAME`] bytes.
    pub name: String,
    /// Whether it is attached, as opposed to having said goodbye.
    pub attached: bool,
}

/// What a superblock says. Plain data: who changes it is the member's business.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Superblock {
    /// The pool.
    pub spec: PoolSpec,
    /// Which member of the pool this store is.
    pub member: MemberId,
    /// Identity of this store.
    pub store: StoreId,
    /// The newest view that was committed here.
    pub view: View,
    /// The newest attachment that was accepted here; never below the view's.
    pub epoch: Epoch,
    /// The last mark of the attachment that made the view.
    pub mark: Mark,
    /// What this member remembers of all members of the view.
    pub attested: Attested,
    /// Who made that attachment.
    pub client: Option<ClientRecord>,
    /// The store was closed in order, with nothing in flight and everything flushed.
    pub clean_shutdown: bool,
    /// What completed is durable without a flush.
    pub write_through: bool,
    /// A flush of the data failed, and no client has dealt with that since: what was not flushed may be gone.
    pub flush_failed: bool,
    /// When the store was created, in seconds since the Unix epoch.
    pub created_unix_s: u64,
    /// Where everything lies.
    pub layout: Layout,
}

/// Why the bytes of a superblock are not believed.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum SuperblockError {
    /// No superblock of any format.
    #[error("no superblock here (the magic is missing)")]
    Magic,
    /// Some byte changed, or it was written in part.
    #[error("damaged: checksum {found:08x} does not match its content, {computed:08x}")]
    Checksum {
        /// What it says.
        found: u32,
        /// What its content gives.
        computed: u32,
    },
    /// Intact, and written by a newer program.
    #[error(
        "written in format {found}; this program knows formats up to {FORMAT_VERSION}: use a newer rmr-node"
    )]
    NewerFormat {
        /// The format that it is in.
        found: u32,
    },
    /// The checksum is right, and some field cannot be.
    #[error("its content makes no sense: {0}")]
    Field(String),
}

/// Why a [`Superblock`] cannot be written: it would not read back.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum InvalidSuperblock {
    /// The pool specification is not valid.
    #[error("pool specification: {0}")]
    Spec(#[from] SpecError),
    /// The view is not valid.
    #[error("view: {0}")]
    View(#[from] ViewError),
    /// The specification does not list this store as this member.
    #[error("the specification of pool '{pool}' does not list store {store} as member {member}")]
    NotAMember {
        /// Name of the pool.
        pool: String,
        /// This member.
        member: MemberId,
        /// This store.
        store: StoreId,
    },
    /// The address of a member would not read back.
    #[error("address '{0}' is longer than {MAX_ADDRESS} bytes or does not read back as itself")]
    Address(String),
    /// The client's name is too long.
    #[error("the client's name is {0} bytes long, at most {MAX_CLIENT_NAME} fit")]
    ClientName(usize),
    /// The view is of a later attachment than the newest accepted.
    #[error("the view is of epoch {view}, newer than the store's epoch {store}")]
    Epoch {
        /// Epoch of the view.
        view: Epoch,
        /// Epoch of the store.
        store: Epoch,
    },
    /// The maps are too small for the pool.
    #[error(
        "the maps have room for {room} chunks and the pool has {needed}: create the store anew with more room"
    )]
    MapRoom {
        /// What the layout has.
        room: u64,
        /// What the pool needs.
        needed: u64,
    },
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Clone, Copy)]
#[repr(C)]
struct RawMember {
    store: [u8; 16],
    id: u8,
    address_length: u8,
    flags: u8,
    reserved: [u8; 5],
    address: [u8; MAX_ADDRESS],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Clone, Copy)]
#[repr(C)]
struct RawMemberView {
    store: [u8; 16],
    id: u8,
    state: u8,
    reserved: [u8; 6],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Clone, Copy)]
#[repr(C)]
struct RawPosition {
    epoch: U64,
    view_epoch: U64,
    view: U64,
    mark: U64,
}

/// A superblock as it lies on disk. Magic, version and checksum stay where they are in every future format.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawSuperblock {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    generation: U64,
    pool: [u8; 16],
    store: [u8; 16],
    size: U64,
    created_unix_s: U64,
    map_offset: U64,
    map_stride: U64,
    data_offset: U64,
    pages_per_map: U32,
    logical_block_size: U32,
    chunk_shift: u8,
    member: u8,
    flags: u8,
    member_count: u8,
    view_member_count: u8,
    name_length: u8,
    client_name_length: u8,
    reserved_a: u8,
    epoch: U64,
    view_number: U64,
    view_epoch: U64,
    client: [u8; 16],
    name: [u8; MAX_NAME_LENGTH],
    client_name: [u8; MAX_CLIENT_NAME],
    members: [RawMember; MAX_MEMBERS],
    view: [RawMemberView; MAX_MEMBERS],
    mark: U64,
    regressed: u8,
    reserved_b: [u8; 7],
    attested: [RawPosition; MAX_MEMBERS],
    reserved_c: [u8; 2072],
}

const _: () = assert!(size_of::<RawSuperblock>() as u64 == PAGE_SIZE);

impl Superblock {
    /// Checks everything that must hold for the superblock to read back.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<(), InvalidSuperblock> {
        self.spec.validate()?;
        self.view.validate()?;
        if self.spec.member(self.member).is_none_or(|m| m.store != self.store) {
            let (pool, member, store) = (self.spec.name.clone(), self.member, self.store);
            return Err(InvalidSuperblock::NotAMember { pool, member, store });
        }
        for member in &self.spec.members {
            let text = member.address.to_string();
            if text.len() > MAX_ADDRESS || text.parse().as_ref() != Ok(&member.address) {
                return Err(InvalidSuperblock::Address(text));
            }
        }
        if let Some(client) = &self.client
            && client.name.len() > MAX_CLIENT_NAME
        {
            return Err(InvalidSuperblock::ClientName(client.name.len()));
        }
        if self.view.epoch > self.epoch {
            return Err(InvalidSuperblock::Epoch { view: self.view.epoch, store: self.epoch });
        }
        let (room, needed) = (self.layout.chunk_capacity(), self.spec.chunk_count());
        if needed > room {
            return Err(InvalidSuperblock::MapRoom { room, needed });
        }
        Ok(())
    }

    /// The bytes of the superblock of this generation.
    ///
    /// # Errors
    /// When it would not read back; see [`Superblock::validate`].
    pub fn encode(&self, generation: u64) -> Result<Box<AlignedPage>, InvalidSuperblock> {
        self.encode_as(FORMAT_VERSION, generation)
    }

    fn encode_as(&self, version: u32, generation: u64) -> Result<Box<AlignedPage>, InvalidSuperblock> {
        self.validate()?;
        let mut raw = RawSuperblock::new_zeroed();
        raw.magic = SUPERBLOCK_MAGIC;
        raw.version = U32::new(version);
        raw.generation = U64::new(generation);
        raw.pool = *self.spec.id.as_bytes();
        raw.store = *self.store.as_bytes();
        raw.size = U64::new(self.spec.size);
        raw.created_unix_s = U64::new(self.created_unix_s);
        raw.map_offset = U64::new(self.layout.map_offset);
        raw.map_stride = U64::new(self.layout.map_stride);
        raw.data_offset = U64::new(self.layout.data_offset);
        raw.pages_per_map = U32::new(self.layout.pages_per_map);
        raw.logical_block_size = U32::new(self.spec.logical_block_size);
        raw.chunk_shift = small(self.spec.chunk_size.shift() as usize);
        raw.member = self.member.as_u8();
        raw.flags = self.flags();
        raw.member_count = small(self.spec.members.len());
        raw.view_member_count = small(self.view.members.len());
        raw.name_length = put_text(&mut raw.name, &self.spec.name);
        raw.epoch = U64::new(self.epoch.0);
        raw.view_number = U64::new(self.view.number.0);
        raw.view_epoch = U64::new(self.view.epoch.0);
        if let Some(client) = &self.client {
            raw.client = *client.id.as_bytes();
            raw.client_name_length = put_text(&mut raw.client_name, &client.name);
        }
        for (to, from) in raw.members.iter_mut().zip(&self.spec.members) {
            to.store = *from.store.as_bytes();
            to.id = from.id.as_u8();
            to.flags = if from.maintenance { FLAG_MAINTENANCE } else { 0 };
            to.address_length = put_text(&mut to.address, &from.address.to_string());
        }
        for (to, from) in raw.view.iter_mut().zip(&self.view.members) {
            to.store = *from.store.as_bytes();
            to.id = from.id.as_u8();
            to.state = from.state as u8;
        }
        raw.mark = U64::new(self.mark.0);
        raw.regressed = self.attested.regressed.0;
        for member in MemberId::all() {
            let position = self.attested.of(member);
            raw.attested[member.index()] = RawPosition {
                epoch: U64::new(position.epoch.0),
                view_epoch: U64::new(position.view_epoch.0),
                view: U64::new(position.view.0),
                mark: U64::new(position.mark.0),
            };
        }
        raw.crc = U32::new(page_checksum(raw.as_bytes()));
        Ok(AlignedPage::from_bytes(raw.as_bytes()))
    }

    /// Reads the superblock copy in place `slot` and gives it with its generation.
    ///
    /// # Errors
    /// When the copy is absent, damaged, newer than this program, or says what cannot be.
    pub fn decode(bytes: &[u8], slot: usize) -> Result<(u64, Self), SuperblockError> {
        let raw = RawSuperblock::ref_from_bytes(bytes).map_err(|_| SuperblockError::Magic)?;
        if raw.magic != SUPERBLOCK_MAGIC {
            return Err(SuperblockError::Magic);
        }
        let (found, computed) = (raw.crc.get(), page_checksum(bytes));
        if found != computed {
            return Err(SuperblockError::Checksum { found, computed });
        }
        let version = raw.version.get();
        if version > FORMAT_VERSION {
            return Err(SuperblockError::NewerFormat { found: version });
        }
        if version < OLDEST_VERSION {
            return Err(SuperblockError::Field(format!("format version {version}")));
        }
        let generation = raw.generation.get();
        if slot_of(generation) != slot {
            return Err(SuperblockError::Field(format!(
                "generation {generation} does not belong in copy {slot}"
            )));
        }
        let superblock = raw.read().map_err(SuperblockError::Field)?;
        // What reads must also write as the very same bytes: this covers every length, pad and reserved byte.
        match superblock.encode_as(version, generation) {
            Ok(_) if version == 1 && superblock.has_history() => {
                Err(SuperblockError::Field("format 1 with a history".to_owned()))
            }
            Ok(again) if again.bytes() == bytes => Ok((generation, superblock)),
            Ok(_) => Err(SuperblockError::Field("reserved bytes are not zero".to_owned())),
            Err(error) => Err(SuperblockError::Field(error.to_string())),
        }
    }

    /// How far the store has come in the history of its pool.
    #[must_use]
    pub const fn position(&self) -> Position {
        Position::new(self.epoch, &self.view, self.mark)
    }

    fn has_history(&self) -> bool {
        self.mark != Mark(0) || self.attested != Attested::default()
    }

    fn flags(&self) -> u8 {
        let flag = |on: bool, flag| if on { flag } else { 0 };
        flag(self.clean_shutdown, FLAG_CLEAN)
            | flag(self.write_through, FLAG_WRITE_THROUGH)
            | flag(self.flush_failed, FLAG_FLUSH_FAILED)
            | flag(self.client.is_some(), FLAG_CLIENT_KNOWN)
            | flag(self.client.as_ref().is_some_and(|c| c.attached), FLAG_CLIENT_ATTACHED)
    }
}

impl RawSuperblock {
    fn read(&self) -> Result<Superblock, String> {
        let member_id = |id| MemberId::new(id).ok_or_else(|| format!("member id {id}"));
        let layout = Layout::for_pages(self.pages_per_map.get())
            .filter(|l| {
                (l.map_offset, l.map_stride, l.data_offset)
                    == (self.map_offset.get(), self.map_stride.get(), self.data_offset.get())
            })
            .ok_or_else(|| format!("offsets do not fit {} pages per map", self.pages_per_map))?;
        let chunk_size = 1u64
            .checked_shl(u32::from(self.chunk_shift))
            .and_then(|bytes| ChunkSize::from_bytes(bytes).ok())
            .ok_or_else(|| format!("chunk size 2^{}", self.chunk_shift))?;
        let mut members = Vec::new();
        for raw in counted(&self.members, self.member_count)? {
            let address: Address =
                get_text(&raw.address, raw.address_length)?.parse().map_err(|e| format!("{e}"))?;
            let store = StoreId::from_bytes(raw.store);
            let maintenance = raw.flags & FLAG_MAINTENANCE != 0;
            members.push(MemberSpec { id: member_id(raw.id)?, store, address, maintenance });
        }
        let spec = PoolSpec {
            id: PoolId::from_bytes(self.pool),
            name: get_text(&self.name, self.name_length)?,
            size: self.size.get(),
            chunk_size,
            logical_block_size: self.logical_block_size.get(),
            members,
        };
        let mut lines = Vec::new();
        for raw in counted(&self.view, self.view_member_count)? {
            let state =
                MemberState::from_code(raw.state).ok_or_else(|| format!("member state {}", raw.state))?;
            lines.push(MemberView { id: member_id(raw.id)?, store: StoreId::from_bytes(raw.store), state });
        }
        let number = ViewNumber(self.view_number.get());
        let view = View { number, epoch: Epoch(self.view_epoch.get()), members: lines };
        let client = if self.flags & FLAG_CLIENT_KNOWN == 0 {
            None
        } else {
            Some(ClientRecord {
                id: ClientId::from_bytes(self.client),
                name: get_text(&self.client_name, self.client_name_length)?,
                attached: self.flags & FLAG_CLIENT_ATTACHED != 0,
            })
        };
        let mut attested = Attested::default();
        attested.regressed = MemberSet(self.regressed);
        for (member, raw) in MemberId::all().zip(&self.attested) {
            let position = Position {
                epoch: Epoch(raw.epoch.get()),
                view_epoch: Epoch(raw.view_epoch.get()),
                view: ViewNumber(raw.view.get()),
                mark: Mark(raw.mark.get()),
            };
            attested.set(member, &position);
        }
        Ok(Superblock {
            mark: Mark(self.mark.get()),
            attested,
            spec,
            member: member_id(self.member)?,
            store: StoreId::from_bytes(self.store),
            view,
            epoch: Epoch(self.epoch.get()),
            client,
            clean_shutdown: self.flags & FLAG_CLEAN != 0,
            write_through: self.flags & FLAG_WRITE_THROUGH != 0,
            flush_failed: self.flags & FLAG_FLUSH_FAILED != 0,
            created_unix_s: self.created_unix_s.get(),
            layout,
        })
    }
}

/// The longest beginning of `name` that fits a [`ClientRecord`], cut between characters.
#[must_use]
pub fn fit_client_name(name: &str) -> &str {
    let mut end = name.len().min(MAX_CLIENT_NAME);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

fn small(number: usize) -> u8 {
    u8::try_from(number).expect("checked by validate to be at most 128")
}

fn put_text(field: &mut [u8], text: &str) -> u8 {
    field[..text.len()].copy_from_slice(text.as_bytes());
    small(text.len())
}

fn get_text(field: &[u8], length: u8) -> Result<String, String> {
    let text = field.get(..usize::from(length)).ok_or_else(|| format!("text length {length}"))?;
    String::from_utf8(text.to_vec()).map_err(|_| "text that is not UTF-8".to_owned())
}

fn counted<T>(items: &[T], count: u8) -> Result<&[T], String> {
    items.get(..usize::from(count)).ok_or_else(|| format!("{count} members"))
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A superblock of a two-member pool of `size` bytes.
    pub(in crate::store) fn sample(size: u64) -> Superblock {
        let member = |id| MemberSpec {
            maintenance: id == 3,
            ..MemberSpec::new(
                MemberId::new(id).unwrap(),
                StoreId::random(),
                Address::tcp("node", 7700 + u16::from(id)),
            )
        };
        let members = vec![member(0), member(3)];
        let spec = PoolSpec {
            id: PoolId::random(),
            name: "vm-1".into(),
            size,
            chunk_size: ChunkSize::from_bytes(64 << 10).unwrap(),
            logical_block_size: 512,
            members,
        };
        Superblock {
            member: spec.members[1].id,
            store: spec.members[1].store,
            view: View::initial(spec.members.iter().map(|m| (m.id, m.store))),
            epoch: Epoch(4),
            mark: Mark(0),
            attested: Attested::default(),
            client: Some(ClientRecord { id: ClientId::random(), name: "host/42 ü".into(), attached: true }),
            clean_shutdown: false,
            write_through: true,
            flush_failed: true,
            created_unix_s: 1_800_000_000,
            layout: Layout::for_chunks(spec.chunk_count()).unwrap(),
            spec,
        }
    }

    #[test]
    fn a_superblock_reads_back_from_its_own_place_only() {
        for (client, clean) in [(true, false), (false, true)] {
            let mut superblock = sample(64 << 20);
            superblock.clean_shutdown = clean;
            if !client {
                superblock.client = None;
            }
            let page = superblock.encode(7).unwrap();
            assert_eq!(Superblock::decode(page.bytes(), 1), Ok((7, superblock)));
            assert!(matches!(Superblock::decode(page.bytes(), 0), Err(SuperblockError::Field(_))));
        }
    }

    #[test]
    fn what_is_known_of_the_history_reads_back() {
        let mut superblock = sample(64 << 20);
        superblock.mark = Mark(7);
        let position = Position { epoch: Epoch(4), view_epoch: Epoch(3), view: ViewNumber(9), mark: Mark(6) };
        superblock.attested.set(superblock.member, &position);
        superblock.attested.regressed.insert(superblock.member);
        let page = superblock.encode(7).unwrap();
        assert_eq!(Superblock::decode(page.bytes(), 1), Ok((7, superblock)));
    }

    #[test]
    fn a_superblock_of_format_1_is_read_and_has_no_history() {
        let superblock = sample(64 << 20);
        let mut page = superblock.encode_as(1, 7).unwrap();
        assert_eq!(Superblock::decode(page.bytes(), 1), Ok((7, superblock)));
        page.bytes_mut()[1752] = 1;
        reseal(page.bytes_mut());
        assert!(matches!(Superblock::decode(page.bytes(), 1), Err(SuperblockError::Field(_))));
        page.bytes_mut()[8] = 0;
        reseal(page.bytes_mut());
        assert!(matches!(Superblock::decode(page.bytes(), 1), Err(SuperblockError::Field(_))));
    }

    #[test]
    fn no_flipped_bit_is_accepted() {
        let mut page = sample(64 << 20).encode(2).unwrap();
        for byte in 0..page.bytes().len() {
            for bit in 0..8 {
                page.bytes_mut()[byte] ^= 1 << bit;
                assert!(Superblock::decode(page.bytes(), 0).is_err(), "flip of bit {bit} of byte {byte}");
                page.bytes_mut()[byte] ^= 1 << bit;
            }
        }
    }

    #[test]
    fn a_newer_format_is_told_from_damage() {
        let mut page = sample(64 << 20).encode(2).unwrap();
        page.bytes_mut()[8] = 3;
        assert!(matches!(Superblock::decode(page.bytes(), 0), Err(SuperblockError::Checksum { .. })));
        reseal(page.bytes_mut());
        assert_eq!(Superblock::decode(page.bytes(), 0), Err(SuperblockError::NewerFormat { found: 3 }));
    }

    #[test]
    fn what_would_not_read_back_is_not_written() {
        let broken = |change: fn(&mut Superblock)| {
            let mut superblock = sample(64 << 20);
            change(&mut superblock);
            superblock.encode(1).unwrap_err()
        };
        assert!(matches!(broken(|s| s.spec.size = 1), InvalidSuperblock::Spec(_)));
        assert!(matches!(broken(|s| s.view.members.clear()), InvalidSuperblock::View(_)));
        assert!(matches!(broken(|s| s.store = StoreId::random()), InvalidSuperblock::NotAMember { .. }));
        assert!(matches!(broken(|s| s.view.epoch = Epoch(9)), InvalidSuperblock::Epoch { .. }));
        assert!(matches!(broken(|s| s.spec.size = 1 << 40), InvalidSuperblock::MapRoom { .. }));
        let long = |s: &mut Superblock| s.spec.members[0].address = Address::tcp("h".repeat(130), 1);
        assert!(matches!(broken(long), InvalidSuperblock::Address(_)));
        let name = |s: &mut Superblock| s.client.as_mut().unwrap().name = "n".repeat(129);
        assert!(matches!(broken(name), InvalidSuperblock::ClientName(129)));
        assert_eq!(fit_client_name(&"ü".repeat(100)).len(), 128);
        assert_eq!(fit_client_name(&format!("x{}", "ü".repeat(100))).len(), 127);
    }

    /// Makes the checksum right again after a change, as a hostile or buggy writer would.
    pub(in crate::store) fn reseal(bytes: &mut [u8]) {
        let crc = page_checksum(bytes);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// With a right checksum over wrong content, nothing panics, and whatever is accepted is valid and exact.
        #[test]
        fn sealed_nonsense_never_panics(changes in prop::collection::vec((16usize..2100, any::<u8>()), 1..6)) {
            let mut page = sample(64 << 20).encode(2).unwrap();
            for (at, value) in changes {
                page.bytes_mut()[at] = value;
            }
            reseal(page.bytes_mut());
            if let Ok((generation, superblock)) = Superblock::decode(page.bytes(), 0) {
                prop_assert_eq!(superblock.validate(), Ok(()));
                let again = superblock.encode(generation).unwrap();
                prop_assert_eq!(again.bytes(), page.bytes());
            }
        }
    }
}
