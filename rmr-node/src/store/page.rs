//! One page of a map on disk: a header that proves where, whose and how new the page is, and the bits.
//! `docs/on-disk-format.md` has the layout byte by byte.

use rmr_common::pool::{MemberId, StoreId};
use thiserror::Error;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::{CHUNKS_PER_PAGE, MapKind, PAGE_BITS_BYTES, PAGE_SIZE};
use crate::disk::AlignedPage;

/// The format of map pages.
const PAGE_VERSION: u32 = 1;
/// First bytes of every map page.
pub(super) const MAP_MAGIC: [u8; 8] = *b"RMRMAP\r\n";

/// The bits of one map page: bit `n` (least significant first) is chunk `page index * CHUNKS_PER_PAGE + n`.
pub type PageBits = [u8; PAGE_BITS_BYTES];

/// A map page as it lies on disk.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawPage {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    store: [u8; 16],
    sequence: U64,
    kind: u8,
    member: u8,
    reserved_a: [u8; 2],
    index: U32,
    reserved_b: [u8; 16],
    bits: PageBits,
}

const _: () = assert!(size_of::<RawPage>() as u64 == PAGE_SIZE);

/// Why the bytes of a map page are not believed.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum PageError {
    /// Neither this format nor any other that is known.
    #[error("it does not start with the magic of a map page")]
    Magic,
    /// The medium gave an I/O error.
    #[error("it cannot be read (I/O error)")]
    Unreadable,
    /// Some byte changed, or the page was written in part.
    #[error("checksum {found:08x} does not match its content, {computed:08x}")]
    Checksum {
        /// What the page says.
        found: u32,
        /// What its content gives.
        computed: u32,
    },
    /// An intact page of something else: another format, store, map, place or copy.
    #[error("{what} is {found}, expected {expected}")]
    Misplaced {
        /// Which field differs.
        what: &'static str,
        /// What the page says.
        found: String,
        /// What belongs here.
        expected: String,
    },
}

/// CRC32C of a page whose checksum stands in bytes 12..16, computed with those bytes zero.
pub(super) fn page_checksum(bytes: &[u8]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&bytes[..12]);
    digest.update(&[0; 4]);
    digest.update(&bytes[16..]);
    u32::try_from(digest.finalize() & 0xffff_ffff).expect("masked to 32 bits")
}

/// Which of its two places a page with this sequence number or superblock generation lies in. Alternation follows
/// from it: the next number always goes to the other place than the newest valid one.
#[must_use]
pub(super) const fn slot_of(sequence: u64) -> usize {
    (sequence % 2) as usize
}

/// The bytes of a map page.
#[must_use]
pub(super) fn encode_page(
    store: StoreId,
    kind: MapKind,
    index: u32,
    sequence: u64,
    bits: &PageBits,
) -> Box<AlignedPage> {
    let (kind, member) = kind_codes(kind);
    let mut raw = RawPage {
        magic: MAP_MAGIC,
        version: U32::new(PAGE_VERSION),
        crc: U32::new(0),
        store: *store.as_bytes(),
        sequence: U64::new(sequence),
        kind,
        member,
        reserved_a: [0; 2],
        index: U32::new(index),
        reserved_b: [0; 16],
        bits: *bits,
    };
    raw.crc = U32::new(page_checksum(raw.as_bytes()));
    AlignedPage::from_bytes(raw.as_bytes())
}

/// Reads a map page that must be page `index` of map `kind` of `store`, from its place `slot`.
///
/// # Errors
/// When the page is damaged or belongs elsewhere.
pub(super) fn decode_page(
    bytes: &[u8],
    store: StoreId,
    kind: MapKind,
    index: u32,
    slot: usize,
) -> Result<(u64, Box<PageBits>), PageError> {
    let raw = RawPage::ref_from_bytes(bytes).map_err(|_| PageError::Magic)?;
    if raw.magic != MAP_MAGIC {
        return Err(PageError::Magic);
    }
    let (found, computed) = (raw.crc.get(), page_checksum(bytes));
    if found != computed {
        return Err(PageError::Checksum { found, computed });
    }
    let (kind_code, member_code) = kind_codes(kind);
    let sequence = raw.sequence.get();
    expect("format version", raw.version.get(), PAGE_VERSION)?;
    expect("store", StoreId::from_bytes(raw.store), store)?;
    expect("map kind", raw.kind, kind_code)?;
    expect("member", raw.member, member_code)?;
    expect("page index", raw.index.get(), index)?;
    expect("copy", slot_of(sequence), slot)?;
    let reserved = raw.reserved_a.iter().chain(&raw.reserved_b).filter(|&&b| b != 0).count();
    expect("number of non-zero reserved bytes", reserved, 0)?;
    Ok((sequence, Box::new(raw.bits)))
}

/// The bits of page `index` with every chunk below `chunk_count` set: what a lost page is taken for.
#[must_use]
pub fn full_page(index: u32, chunk_count: u64) -> Box<PageBits> {
    let mut bits = Box::new([0; PAGE_BITS_BYTES]);
    let first = u64::from(index) * CHUNKS_PER_PAGE;
    let mut left = chunk_count.saturating_sub(first).min(CHUNKS_PER_PAGE);
    for byte in bits.iter_mut() {
        let here = left.min(8);
        left -= here;
        *byte = if here == 8 { 0xff } else { (1u8 << here) - 1 };
    }
    bits
}

fn kind_codes(kind: MapKind) -> (u8, u8) {
    match kind {
        MapKind::Intent => (0, 0),
        MapKind::Dirty(member) => (1, MemberId::as_u8(member)),
    }
}

fn expect<T: PartialEq + std::fmt::Display>(
    what: &'static str,
    found: T,
    expected: T,
) -> Result<(), PageError> {
    if found == expected {
        return Ok(());
    }
    Err(PageError::Misplaced { what, found: found.to_string(), expected: expected.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirty(member: u8) -> MapKind {
        MapKind::Dirty(MemberId::new(member).unwrap())
    }

    #[test]
    fn a_page_reads_back_only_in_its_own_place() {
        let (store, other) = (StoreId::random(), StoreId::random());
        let mut bits = [0; PAGE_BITS_BYTES];
        (bits[0], bits[PAGE_BITS_BYTES - 1]) = (1, 0x80);
        let page = encode_page(store, dirty(3), 7, 42, &bits);
        let read = |store, kind, index, slot| decode_page(page.bytes(), store, kind, index, slot);
        assert_eq!(read(store, dirty(3), 7, 0), Ok((42, Box::new(bits))));
        for wrong in [
            read(other, dirty(3), 7, 0),
            read(store, dirty(2), 7, 0),
            read(store, MapKind::Intent, 7, 0),
            read(store, dirty(3), 8, 0),
            read(store, dirty(3), 7, 1),
        ] {
            assert!(matches!(wrong, Err(PageError::Misplaced { .. })), "{wrong:?}");
        }
    }

    #[test]
    fn no_flipped_bit_is_accepted() {
        let store = StoreId::random();
        let mut page = encode_page(store, MapKind::Intent, 0, 1, &[0x5a; PAGE_BITS_BYTES]);
        for byte in 0..page.bytes().len() {
            for bit in 0..8 {
                page.bytes_mut()[byte] ^= 1 << bit;
                let read = decode_page(page.bytes(), store, MapKind::Intent, 0, 1);
                assert!(read.is_err(), "flip of bit {bit} of byte {byte} was accepted");
                page.bytes_mut()[byte] ^= 1 << bit;
            }
        }
    }

    #[test]
    fn a_lost_page_has_every_chunk_of_the_pool_set_and_none_beyond() {
        let ones = |bits: &PageBits| bits.iter().map(|b| u64::from(b.count_ones())).sum::<u64>();
        for count in [0, 1, 8, 13, CHUNKS_PER_PAGE - 1, CHUNKS_PER_PAGE, CHUNKS_PER_PAGE + 5] {
            assert_eq!(ones(&full_page(0, count)), count.min(CHUNKS_PER_PAGE));
            assert_eq!(ones(&full_page(1, count)), count.saturating_sub(CHUNKS_PER_PAGE));
        }
        assert_eq!(full_page(0, 13)[..3], [0xff, 0x1f, 0]);
    }
}
