//! Whole stores on files in memory, on a disk, and on a loop device.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use clap::Parser;
use rmr_common::pool::{Epoch, MemberId, PoolId, PoolSpec, ViewNumber};

use super::backing::Backing;
use super::cli::StoreCommand;
use super::layout::{MapKind, SUPERBLOCK_OFFSETS};
use super::page::{encode_page, slot_of};
use super::superblock::tests::{reseal, sample};
use super::*;
use crate::disk::Medium;

const POOL: u64 = 4 << 20;

fn options() -> CreateOptions {
    let sample = sample(POOL);
    CreateOptions {
        member: sample.member,
        store: sample.store,
        view: sample.view,
        spec: sample.spec,
        overwrite: false,
        zero: ZeroPolicy::Zero,
        max_size: None,
    }
}

/// Makes a store, for tests of others.
pub(crate) fn make(path: &Path) -> PoolSpec {
    let options = options();
    create(path, &options).unwrap();
    options.spec
}

fn create(path: &Path, options: &CreateOptions) -> Result<Superblock, StoreError> {
    Store::create(path, options, &mut |_, _| ())
}

fn change(path: &Path, offset: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

fn chunks(store: &Store, kind: MapKind) -> Vec<u64> {
    store.maps().chunks(kind).map(|chunk| chunk.0).collect()
}

/// Sets bits in a map of a closed store, as a writer with this sequence number would.
fn write_page(path: &Path, superblock: &Superblock, kind: MapKind, sequence: u64, byte: u8) {
    let mut bits = [0; PAGE_BITS_BYTES];
    bits[0] = byte;
    let page = encode_page(superblock.store, kind, 0, sequence, &bits);
    change(path, superblock.layout.page_offset(kind, 0, slot_of(sequence)), page.bytes());
}

fn dirty(member: u8) -> MapKind {
    MapKind::Dirty(MemberId::new(member).unwrap())
}

#[test]
fn a_store_is_created_sparse_opened_once_and_destroyed() {
    for directory in ["/dev/shm", "/tmp"] {
        let directory = tempfile::tempdir_in(directory).unwrap();
        let path = directory.path().join("store");
        let options = options();
        let created = create(&path, &options).unwrap();
        let length = path.metadata().unwrap().len();
        assert_eq!(length, created.layout.store_size(POOL));

        let store = Store::open(&path, Some(options.spec.id)).unwrap();
        assert_eq!(store.superblock().spec, options.spec);
        assert!(store.was_clean() && !store.superblock().clean_shutdown && store.warnings().is_empty());
        assert!(MapKind::all().all(|kind| chunks(&store, kind).is_empty()));
        let disk = store.disk_file().unwrap();
        assert_eq!(
            (disk.size(), store.superblock().write_through),
            (length, disk.medium() == Medium::Memory)
        );
        for second in [
            Store::open(&path, None).map(drop),
            Store::destroy(&path, None).map(drop),
            create(&path, &options).map(drop),
        ] {
            assert!(matches!(second, Err(StoreError::Busy { .. })), "{second:?}");
        }
        let report = Store::inspect(&path).unwrap();
        assert!(report.in_use && report.problems.is_empty(), "{report}");
        drop(store);
        assert!(Store::open(&path, None).is_err(), "the disk of the engine holds the lock still");
        drop(disk);

        let reopened = Store::open(&path, None).unwrap();
        assert!(!reopened.was_clean(), "the mark of a clean shutdown must not survive an open");
        drop(reopened);
        let wrong = Store::destroy(&path, Some(PoolId::random())).unwrap_err();
        assert!(matches!(wrong, StoreError::WrongPool { .. }), "{wrong}");
        Store::destroy(&path, Some(options.spec.id)).unwrap();
        assert!(matches!(Store::open(&path, None), Err(StoreError::NoSuperblock { .. })));
        assert!(matches!(Store::destroy(&path, None), Err(StoreError::NoSuperblock { .. })));
    }
}

/// The kernel reports a failed write-back once for each open file description. Descriptors of one share their position.
#[test]
fn data_metadata_and_growth_have_open_file_descriptions_of_their_own() {
    use std::io::{Seek, SeekFrom};
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    create(&path, &options()).unwrap();
    let store = Store::open(&path, None).unwrap();
    let disk = store.disk_file().unwrap();
    let files = disk.descriptions();
    for (mut file, at) in files.iter().copied().zip([4096, 8192, 12288]) {
        file.seek(SeekFrom::Start(at)).unwrap();
    }
    let positions: Vec<_> = files.into_iter().map(|mut file| file.stream_position().unwrap()).collect();
    assert_eq!(positions, [4096, 8192, 12288]);
}

#[test]
fn a_store_is_not_opened_by_a_name_that_another_file_has_now() {
    let directory = tempfile::tempdir().unwrap();
    let [path, other] = ["store", "other"].map(|name| directory.path().join(name));
    create(&path, &options()).unwrap();
    let store = Store::open(&path, None).unwrap();
    std::fs::rename(&path, &other).unwrap();
    std::fs::copy(&other, &path).unwrap();
    let error = store.disk_file().unwrap_err().to_string();
    assert!(error.contains("another file has this name now"), "{error}");
}

/// A process that ends after a failed flush leaves pages that read as written, and are not on the disk.
#[test]
fn after_an_unclean_end_every_page_is_written_again_and_after_a_clean_one_none_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let superblock = create(&path, &options()).unwrap();
    let page = |slot| {
        let mut bytes = vec![0; 4096];
        let offset = superblock.layout.page_offset(dirty(1), 0, slot);
        File::open(&path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    };
    let read = |sequence: u64| {
        let slot = slot_of(sequence);
        super::page::decode_page(&page(slot), superblock.store, dirty(1), 0, slot).unwrap()
    };
    // As created, with the sequences 1 and 2.
    drop(Store::open(&path, None).unwrap());
    assert_eq!((read(1).0, read(2).0), (1, 2));
    write_page(&path, &superblock, dirty(1), 3, 0x80);
    let store = Store::open(&path, None).unwrap();
    assert_eq!(chunks(&store, dirty(1)), [7]);
    // The newest copy stays, the older one is as new.
    assert_eq!((read(3).0, read(4).0), (3, 4));
    assert_eq!(read(3).1, read(4).1);
}

#[test]
fn a_creation_that_was_cut_short_is_in_nobodys_way() {
    let directory = tempfile::tempdir().unwrap();
    let (path, other) = (directory.path().join("a.store"), directory.path().join("b.store"));
    let left = |path: &Path| PathBuf::from(format!("{}.rmr-unfinished", path.display()));
    let not_ours = directory.path().join("notes.unfinished");
    for path in [&left(&path), &left(&other), &not_ours] {
        std::fs::write(path, [7; 100_000]).unwrap();
    }
    let options = options();
    let created = create(&path, &options).unwrap();
    assert!(!left(&path).exists());
    let report = Store::inspect(&path).unwrap();
    assert!(report.problems.is_empty() && path.metadata().unwrap().len() == created.layout.store_size(POOL));
    // One that is being made, by another process as it were, is left alone.
    let busy = Backing::open(&left(&other)).unwrap();
    assert!(matches!(create(&other, &options), Err(StoreError::Busy { .. })));
    assert_eq!(remove_unfinished(directory.path()).unwrap(), Vec::<PathBuf>::new());
    drop(busy);
    assert_eq!(remove_unfinished(directory.path()).unwrap(), [left(&other)]);
    assert!(path.exists() && !other.exists() && not_ours.exists());
    // What fails leaves nothing.
    std::fs::create_dir(left(&other)).unwrap();
    assert!(matches!(create(&other, &options), Err(StoreError::NotADisk(_))));
    assert!(!other.exists());
}

#[test]
fn nothing_recognisable_is_overwritten_unless_said() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let (first, second) = (options(), options());
    create(&path, &first).unwrap();
    let error = create(&path, &second).unwrap_err();
    assert!(matches!(&error, StoreError::Occupied { found, .. } if found.len() == 2), "{error}");
    assert_eq!(Store::open(&path, None).unwrap().superblock().store, first.store);
    create(&path, &CreateOptions { overwrite: true, ..second.clone() }).unwrap();
    assert_eq!(Store::open(&path, None).unwrap().superblock().store, second.store);

    let notes = directory.path().join("notes");
    std::fs::write(&notes, "do not lose me").unwrap();
    assert!(matches!(create(&notes, &first), Err(StoreError::FileHasData(_))));
    assert_eq!(std::fs::read(&notes).unwrap(), b"do not lose me");
    let overwrite = CreateOptions { overwrite: true, ..first.clone() };
    assert!(matches!(create(&notes, &overwrite), Err(StoreError::TooSmall { .. })));
    assert_eq!(std::fs::read(&notes).unwrap(), b"do not lose me");
}

#[test]
fn unfit_places_are_refused_and_left_as_they_were() {
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(create(directory.path(), &options()), Err(StoreError::NotADisk(_))));
    assert!(matches!(create(Path::new("/dev/null"), &options()), Err(StoreError::NotADisk(_))));
    let small = directory.path().join("small");
    File::create(&small).unwrap().set_len(1 << 20).unwrap();
    assert!(matches!(create(&small, &options()), Err(StoreError::TooSmall { .. })));
    assert_eq!(small.metadata().unwrap().len(), 1 << 20);
    let new = directory.path().join("new");
    let mut broken = options();
    broken.spec.size = 5;
    assert!(matches!(create(&new, &broken), Err(StoreError::Invalid { .. })));
    assert!(!new.exists());
}

#[test]
fn a_damaged_superblock_copy_costs_nothing_and_two_cost_the_store() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    for offset in SUPERBLOCK_OFFSETS {
        let options = CreateOptions { overwrite: true, ..options() };
        create(&path, &options).unwrap();
        change(&path, offset + 500, b"rot");
        assert_eq!(Store::inspect(&path).unwrap().problems.len(), 1);
        let store = Store::open(&path, None).unwrap();
        assert_eq!((store.superblock().store, store.warnings().len()), (options.store, 1));
        drop(store);
        assert!(Store::open(&path, None).unwrap().warnings().is_empty(), "opening repairs it");
    }
    for offset in SUPERBLOCK_OFFSETS {
        change(&path, offset + 500, b"rot");
    }
    let error = Store::open(&path, None).unwrap_err().to_string();
    assert!(error.contains("checksum"), "{error}");
    let report = Store::inspect(&path).unwrap();
    assert!(report.superblock.is_none() && report.to_string().contains("PROBLEM"));
}

#[test]
fn the_mark_of_a_clean_shutdown_does_not_come_back_with_whichever_superblock_copy_is_left() {
    for slot in [0, 1] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        make(&path);
        assert!(Store::open(&path, None).unwrap().was_clean());
        // The process ends without a word, and one copy rots.
        change(&path, SUPERBLOCK_OFFSETS[slot], &[0xee; 4096]);
        assert!(!Store::open(&path, None).unwrap().was_clean(), "copy {slot} is lost");
    }
}

#[test]
fn foreign_newer_and_truncated_stores_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let created = create(&path, &options()).unwrap();
    assert!(matches!(Store::open(&path, Some(PoolId::random())), Err(StoreError::WrongPool { .. })));
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(created.layout.store_size(POOL) - 4096).unwrap();
    assert!(matches!(Store::open(&path, None), Err(StoreError::TooSmall { .. })));
    assert_eq!(Store::inspect(&path).unwrap().problems.len(), 1);
    file.set_len(created.layout.store_size(POOL)).unwrap();
    let mut newer = created.encode(3).unwrap();
    newer.bytes_mut()[8] = 3;
    reseal(newer.bytes_mut());
    change(&path, SUPERBLOCK_OFFSETS[1], newer.bytes());
    assert!(matches!(Store::open(&path, None), Err(StoreError::NewerFormat { .. })));
    let other = sample(POOL).encode(3).unwrap();
    change(&path, SUPERBLOCK_OFFSETS[1], other.bytes());
    assert!(matches!(Store::open(&path, None), Err(StoreError::TwoStores(_))));
}

#[test]
fn a_torn_page_leaves_the_older_copy_and_a_lost_one_counts_as_all_set() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let created = create(&path, &options()).unwrap();
    let all: Vec<u64> = (0..created.spec.chunk_count()).collect();
    drop(Store::open(&path, None).unwrap());
    // Unclean from here on. Sequence 3 is whole, 4 is torn.
    write_page(&path, &created, dirty(1), 3, 0b101);
    write_page(&path, &created, dirty(1), 4, 0b111);
    change(&path, created.layout.page_offset(dirty(1), 0, 0) + 3000, b"torn");
    for slot in 0..2 {
        change(&path, created.layout.page_offset(dirty(2), 0, slot) + 100, b"lost");
    }
    let store = Store::open(&path, None).unwrap();
    assert_eq!(store.maps().pages(dirty(1))[0].health, PageHealth::Torn);
    assert_eq!(chunks(&store, dirty(1)), [0, 2]);
    assert_eq!((chunks(&store, dirty(2)), store.maps().count(MapKind::Intent)), (all.clone(), 0));
    assert_eq!(store.warnings().len(), 2);
    drop(store);
    let store = Store::open(&path, None).unwrap();
    assert!(store.warnings().is_empty(), "opening repairs what it can: {:?}", store.warnings());
    assert_eq!((chunks(&store, dirty(1)), chunks(&store, dirty(2))), (vec![0, 2], all));
}

#[test]
fn a_page_that_rotted_on_a_closed_store_is_not_taken_for_a_torn_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let created = create(&path, &options()).unwrap();
    write_page(&path, &created, dirty(0), 3, 0b1);
    change(&path, created.layout.page_offset(dirty(0), 0, 1) + 3000, b"rot");
    let store = Store::open(&path, None).unwrap();
    assert_eq!(store.maps().pages(dirty(0))[0].health, PageHealth::Rotten);
    assert_eq!(store.maps().count(dirty(0)), created.spec.chunk_count());
}

#[test]
fn no_changed_byte_of_the_metadata_loses_a_bit_or_opens_as_another_store() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("store");
    let created = create(&path, &options()).unwrap();
    let marked = [dirty(0), MapKind::Intent];
    for kind in marked {
        // Both copies hold the bit, as they do once a page was written twice.
        write_page(&path, &created, kind, 3, 0b10);
        write_page(&path, &created, kind, 4, 0b10);
    }
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut places: Vec<u64> = SUPERBLOCK_OFFSETS.into();
    places.extend(marked.iter().flat_map(|&k| [0, 1].map(|slot| created.layout.page_offset(k, 0, slot))));
    for page in places {
        // Every byte of the header and a sample of the rest; the codecs' own tests flip every bit.
        for at in (page..page + 64).chain((page + 64..page + 4096).step_by(61)) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            let report = Store::inspect(&path).unwrap();
            assert_eq!(report.problems.len(), 1, "the change of byte {at} went unnoticed");
            assert_eq!(report.superblock.as_ref(), Some(&created));
            let marks = report.maps.iter().filter(|m| m.chunks_set > 0).count();
            assert_eq!(marks, 2, "a bit was lost by the change of byte {at}");
            file.write_all_at(&byte, at).unwrap();
        }
    }
    assert!(Store::inspect(&path).unwrap().problems.is_empty());
}

#[test]
fn a_block_device_is_claimed_zeroed_and_refused_while_in_use() {
    let options = options();
    let Some(device) = crate::disk::tests::LoopDevice::new(32 << 20) else { return };
    // What an ext4 file system and a RAID member leave behind.
    change(&device.path, 0x438, &[0x53, 0xef]);
    change(&device.path, (32 << 20) - 8192, &0xa92b_4efc_u32.to_le_bytes());
    let error = create(&device.path, &options).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("ext4") && text.contains("1.0") && text.contains("--overwrite"), "{text}");
    let overwrite = CreateOptions { overwrite: true, ..options.clone() };
    let assume = CreateOptions { zero: ZeroPolicy::AssumeZero, ..overwrite.clone() };
    assert!(matches!(create(&device.path, &assume), Err(StoreError::NotZero { .. })));
    let mut told = 0;
    let created = Store::create(&device.path, &overwrite, &mut |done, _| told = done).unwrap();
    assert!(told > 0);
    let store = Store::open(&device.path, None).unwrap();
    assert!(matches!(Store::open(&device.path, None), Err(StoreError::Busy { .. })));
    drop(store);
    let mut data = vec![1; (32 << 20) - usize::try_from(created.layout.data_offset).unwrap()];
    File::open(&device.path).unwrap().read_exact_at(&mut data, created.layout.data_offset).unwrap();
    assert!(data.iter().all(|&b| b == 0), "the old signature at the end is still there");
    let most = created.layout.data_offset;
    assert!(device.allocated() <= most, "a new store takes {} bytes of a thin device", device.allocated());
}

#[test]
fn a_device_that_is_said_to_be_empty_is_read_before_a_pool_is_served_from_it() {
    let Some(device) = crate::disk::tests::LoopDevice::new(32 << 20) else { return };
    let first = options();
    let data = create(&device.path, &first).unwrap().layout.data_offset;
    change(&device.path, data + 8192, b"secret of a pool with a key");
    Store::destroy(&device.path, None).unwrap();
    // Nothing on it is recognised any more, and its data is still there.
    let check = CreateOptions { zero: ZeroPolicy::Check, overwrite: true, ..options() };
    match create(&device.path, &check) {
        Err(StoreError::HasData { offset, .. }) => assert_eq!(offset, data + 8192),
        other => panic!("{other:?}"),
    }
    assert!(matches!(Store::open(&device.path, None), Err(StoreError::NoSuperblock { .. })));
    // Also where only a larger pool would reach it.
    change(&device.path, data + 8192, &[0; 32]);
    change(&device.path, (32 << 20) - 1, b"x");
    assert!(matches!(create(&device.path, &check), Err(StoreError::HasData { .. })));
    // Without the claim it is zeroed, and then the claim is true.
    create(&device.path, &CreateOptions { zero: ZeroPolicy::Zero, ..check.clone() }).unwrap();
    Store::destroy(&device.path, None).unwrap();
    create(&device.path, &check).unwrap();
}

fn grow(store: &Store, to: u64) -> Result<Growth, StoreError> {
    store.growth(store.superblock().spec.chunk_size, POOL, to)
}

fn read(path: &Path, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![1; usize::try_from(length).unwrap()];
    File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn a_file_that_grows_keeps_its_data_and_reads_as_zeroes_behind_it() {
    for directory in ["/dev/shm", "/tmp"] {
        let directory = tempfile::tempdir_in(directory).unwrap();
        let path = directory.path().join("store");
        let options = options();
        let layout = create(&path, &options).unwrap().layout;
        let end = layout.store_size(POOL);
        change(&path, end - 4096, &[7; 4096]);
        // A file may be longer than its store, and hold anything there.
        change(&path, end, &[9; 8192]);
        let mut store = Store::open(&path, None).unwrap();
        let size = grow(&store, 2 * POOL).unwrap().run().unwrap();
        assert_eq!(size, layout.store_size(2 * POOL));
        store.set_size(size);
        assert_eq!(store.disk_file().unwrap().size(), size);
        assert_eq!(read(&path, end - 4096, 4096), [7; 4096]);
        assert!(read(&path, end, POOL).iter().all(|&byte| byte == 0));
        // As after a crash before the superblock said so: the same again, and a smaller one, change nothing.
        change(&path, end, &[9; 4096]);
        grow(&store, POOL).unwrap().run().unwrap();
        assert_eq!(read(&path, end, 4096), [9; 4096]);
        assert_eq!(grow(&store, 2 * POOL).unwrap().run().unwrap(), size);
        assert!(read(&path, end, POOL).iter().all(|&byte| byte == 0));
        drop(store);
        assert_eq!(Store::open(&path, None).unwrap().superblock().spec.size, POOL);
    }
}

#[test]
fn a_store_does_not_grow_beyond_what_its_maps_have_room_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let options = CreateOptions { max_size: Some(POOL), ..options() };
    let layout = create(&path, &options).unwrap().layout;
    let largest = layout.chunk_capacity() * options.spec.chunk_size.bytes();
    let store = Store::open(&path, None).unwrap();
    grow(&store, largest).unwrap();
    let error = grow(&store, largest + 4096).unwrap_err();
    assert!(matches!(error, StoreError::NoMapRoom { .. }));
    let text = error.to_string();
    assert!(text.contains(&largest.to_string()) && text.contains(&(largest + 4096).to_string()), "{text}");
    assert_eq!(Store::inspect(&path).unwrap().max_pool_size, Some(largest));
}

#[test]
fn a_block_device_grows_into_zeroes_as_far_as_it_goes() {
    let options = options();
    let Some(device) = crate::disk::tests::LoopDevice::new(16 << 20) else { return };
    let layout = create(&device.path, &options).unwrap().layout;
    let end = layout.store_size(POOL);
    change(&device.path, end - 4096, &[7; 4096]);
    change(&device.path, end, &[9; 65536]);
    let store = Store::open(&device.path, None).unwrap();
    let error = grow(&store, 16 << 20).unwrap().run().unwrap_err();
    let sizes = (16 << 20, layout.store_size(16 << 20));
    assert!(
        matches!(error, StoreError::TooSmall { found, needed, .. } if (found, needed) == sizes),
        "{error}"
    );
    grow(&store, 2 * POOL).unwrap().run().unwrap();
    assert_eq!(read(&device.path, end - 4096, 4096), [7; 4096]);
    assert!(read(&device.path, end, POOL).iter().all(|&byte| byte == 0));
}

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: StoreCommand,
}

fn cli(arguments: &[&str]) -> anyhow::Result<()> {
    let line = std::iter::once("store").chain(arguments.iter().copied());
    Cli::try_parse_from(line)?.command.run()
}

#[test]
fn the_command_line_creates_inspects_and_destroys() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let path_text = path.to_str().unwrap();
    let create = ["create", path_text, "--pool", "vm1", "--size", "16M", "--chunk-size", "64K"];
    let members = ["--member", "0=10.0.0.1:7700", "--member", "1=rdma://[fe80::1]:7700"];
    let run = |extra: &[&str]| cli(&[&create[..], &members[..], extra].concat());
    assert!(run(&["--this", "2"]).unwrap_err().to_string().contains("no --member 2"));
    assert!(run(&["--this", "0", "--store-id", "5=67e55044-10b1-426f-9247-bb680e5fe0c8"]).is_err());
    assert!(run(&["--this", "0", "--block-size", "1000"]).is_err());
    assert!(!path.exists());
    run(&["--this", "1"]).unwrap();
    let store = Store::open(&path, None).unwrap();
    assert_eq!((store.superblock().member.as_u8(), store.superblock().spec.members.len()), (1, 2));
    drop(store);
    cli(&["inspect", path_text]).unwrap();
    cli(&["inspect", path_text, "--json"]).unwrap();
    let refused = cli(&["destroy", path_text]).unwrap_err().to_string();
    assert!(refused.contains("'vm1'") && refused.contains("--yes-destroy-all-data"), "{refused}");
    cli(&["destroy", path_text, "--yes-destroy-all-data"]).unwrap();
    assert!(cli(&["inspect", path_text]).is_err());
    assert!(cli(&["create", path_text, "--pool", "vm1", "--size", "16MB"]).is_err());
}

#[test]
fn no_file_is_made_behind_a_link_or_among_devices() {
    let directory = tempfile::tempdir().unwrap();
    let (path, aim) = (directory.path().join("store"), directory.path().join("aim"));
    let options = options();
    let link = |to: &Path, at: &Path| std::os::unix::fs::symlink(to, at).unwrap();
    // A link that leads nowhere, one to a file, and one in the place of the file that is to become the store.
    link(&aim, &path);
    assert!(matches!(create(&path, &options), Err(StoreError::Link(_))));
    std::fs::write(&aim, "precious").unwrap();
    let overwrite = CreateOptions { overwrite: true, ..options.clone() };
    assert!(matches!(create(&path, &overwrite), Err(StoreError::Link(_))));
    std::fs::remove_file(&path).unwrap();
    link(&aim, &directory.path().join("store.rmr-unfinished"));
    assert!(matches!(create(&path, &options), Err(StoreError::Link(_))));
    assert_eq!(std::fs::read_to_string(&aim).unwrap(), "precious");
    let device = Path::new("/dev/no-such-device");
    assert!(matches!(create(device, &options), Err(StoreError::NoSuchDevice(_))));
    assert!(!device.exists());
}

#[test]
fn a_store_is_identified_without_taking_it_from_whoever_has_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let options = options();
    create(&path, &options).unwrap();
    let open = Store::open(&path, None).unwrap();
    assert_eq!(Store::identify(&path).unwrap().store, options.store);
    drop(open);
    assert!(Store::open(&path, None).is_ok());
    std::fs::write(&path, [7; 65536]).unwrap();
    assert!(matches!(Store::identify(&path), Err(StoreError::NoSuperblock { .. })));
}

#[test]
fn a_removed_store_is_none_under_another_name_either() {
    let directory = tempfile::tempdir().unwrap();
    let (path, other) = (directory.path().join("store"), directory.path().join("other"));
    let options = options();
    create(&path, &options).unwrap();
    std::fs::hard_link(&path, &other).unwrap();
    assert!(matches!(Store::remove(&path, Some(PoolId::random())), Err(StoreError::WrongPool { .. })));
    Store::remove(&path, Some(options.spec.id)).unwrap();
    assert!(!path.exists());
    assert_eq!(other.metadata().unwrap().len(), 0);
}

#[test]
fn a_store_that_its_file_system_cannot_hold_is_warned_of() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let mut options = options();
    create(&path, &options).unwrap();
    assert_eq!(Store::open(&path, None).unwrap().space_warning(), None);
    Store::remove(&path, None).unwrap();
    options.spec.size = 256 << 40;
    options.spec.chunk_size = rmr_common::pool::ChunkSize::from_bytes(64 << 20).unwrap();
    options.max_size = Some(options.spec.size);
    // A file system that cannot even have so large a file is none to be warned of.
    if create(&path, &options).is_ok() {
        let warning = Store::open(&path, None).unwrap().space_warning().unwrap();
        assert!(warning.contains("256 TiB more") || warning.contains("may come to need"), "{warning}");
    }
}

#[test]
fn an_epoch_that_used_all_others_up_is_taken_back_and_nothing_else_is_changed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.store");
    let spec = make(&path);
    let (pool, used_up) = (spec.id, Epoch(rmr_common::pool::MAX_NUMBER));
    let data = Store::open(&path, None).unwrap().superblock().layout.data_offset;
    change(&path, data + 4096, &[7; 4096]);
    let raise = |view: bool| {
        let store = Store::open(&path, None).unwrap();
        let mut superblock = store.superblock().clone();
        superblock.epoch = used_up;
        if view {
            (superblock.view.epoch, superblock.view.number) = (used_up, ViewNumber((1 << 62) + 5));
        }
        let generation =
            Recovered::read(&path, &Backing::open_read_only(&path).unwrap().0).unwrap().generation;
        for generation in [generation + 1, generation + 2] {
            let page = superblock.encode(generation).unwrap();
            change(&path, SUPERBLOCK_OFFSETS[slot_of(generation)], page.bytes());
        }
    };
    let run = |args: &[&str]| {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(subcommand)]
            command: StoreCommand,
        }
        let path = path.to_str().unwrap();
        let args = ["store", "reset-epoch", path, "--epoch", "9"].into_iter().chain(args.iter().copied());
        Cli::try_parse_from(args).map_err(anyhow::Error::from).and_then(|cli| cli.command.run())
    };
    let id = pool.to_string();
    let before = Store::open(&path, None).unwrap().superblock().view.epoch;
    raise(false);
    let held = Store::open(&path, None).unwrap();
    assert!(run(&["--pool-id", &id, "--yes-no-client-runs"]).is_err(), "a node serves it");
    drop(held);
    assert!(run(&["--pool-id", &id]).unwrap_err().to_string().contains("nothing was done"));
    assert!(run(&["--pool-id", &PoolId::random().to_string(), "--yes-no-client-runs"]).is_err());
    run(&["--pool-id", &id, "--yes-no-client-runs"]).unwrap();
    let after = Store::open(&path, None).unwrap();
    assert_eq!((after.superblock().epoch, after.superblock().view.epoch), (Epoch(9), before));
    assert_eq!(after.superblock().spec, spec);
    drop(after);
    raise(true);
    run(&["--pool-id", &id, "--yes-no-client-runs"]).unwrap();
    let after = Store::open(&path, None).unwrap();
    let (view, epoch) = (&after.superblock().view, after.superblock().epoch);
    assert_eq!((epoch, view.epoch, view.number), (Epoch(9), Epoch(9), ViewNumber(5)));
    drop(after);
    let error = run(&["--pool-id", &id, "--yes-no-client-runs"]).unwrap_err().to_string();
    assert!(error.contains("nothing is to be taken back"), "{error}");
    let mut bytes = [0; 4096];
    File::open(&path).unwrap().read_exact_at(&mut bytes, data + 4096).unwrap();
    assert_eq!(bytes, [7; 4096]);
}
