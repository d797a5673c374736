//! Recognises what may already be on a device, so that no store is ever created over somebody's data by mistake. The
//! places and magics are those that `libblkid` (util-linux) and the formats' own documentation give.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::Serialize;

use super::layout::SUPERBLOCK_OFFSETS;
use super::superblock::SUPERBLOCK_MAGIC;

/// Something that was recognised.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Signature {
    /// What it is.
    pub name: &'static str,
    /// Where its magic stands, in bytes of the device.
    pub offset: u64,
}

impl std::fmt::Display for Signature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (at byte {})", self.name, self.offset)
    }
}

/// A magic at a fixed place.
struct Magic(&'static str, u64, &'static [u8]);

const KIB: u64 = 1024;
const MIB: u64 = 1 << 20;

const MAGICS: &[Magic] = &[
    Magic("a store of a replicated pool", SUPERBLOCK_OFFSETS[0], &SUPERBLOCK_MAGIC),
    Magic("a store of a replicated pool", SUPERBLOCK_OFFSETS[1], &SUPERBLOCK_MAGIC),
    Magic("an ext2, ext3 or ext4 file system", 0x438, &[0x53, 0xef]),
    Magic("an XFS file system", 0, b"XFSB"),
    Magic("a btrfs file system", 64 * KIB + 0x40, b"_BHRfS_M"),
    Magic("a btrfs file system (second superblock)", 64 * MIB + 0x40, b"_BHRfS_M"),
    Magic("an NTFS file system", 3, b"NTFS    "),
    Magic("an exFAT file system", 3, b"EXFAT   "),
    Magic("a BitLocker volume", 3, b"-FVE-FS-"),
    Magic("a FAT file system", 54, b"FAT12   "),
    Magic("a FAT file system", 54, b"FAT16   "),
    Magic("a FAT file system", 82, b"FAT32   "),
    Magic("an MBR partition table or boot sector", 510, &[0x55, 0xaa]),
    Magic("a GPT partition table", 512, b"EFI PART"),
    Magic("a GPT partition table", 4096, b"EFI PART"),
    Magic("an LVM2 physical volume", 24, b"LVM2 001"),
    Magic("an LVM2 physical volume", 512 + 24, b"LVM2 001"),
    Magic("an LVM2 physical volume", 1024 + 24, b"LVM2 001"),
    Magic("an LVM2 physical volume", 1536 + 24, b"LVM2 001"),
    Magic("a member of an MD RAID (version 1.1)", 0, &[0xfc, 0x4e, 0x2b, 0xa9]),
    Magic("a member of an MD RAID (version 1.2)", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    Magic("a LUKS volume", 0, b"LUKS\xba\xbe"),
    Magic("a LUKS volume (second header)", 16 * KIB, b"SKUL\xba\xbe"),
    Magic("a LUKS volume (second header)", 32 * KIB, b"SKUL\xba\xbe"),
    Magic("a LUKS volume (second header)", 64 * KIB, b"SKUL\xba\xbe"),
    Magic("swap space", 4096 - 10, b"SWAPSPACE2"),
    Magic("swap space", 4096 - 10, b"SWAP-SPACE"),
    Magic("swap space", 8192 - 10, b"SWAPSPACE2"),
    Magic("swap space", 16384 - 10, b"SWAPSPACE2"),
    Magic("swap space", 65536 - 10, b"SWAPSPACE2"),
    Magic("a suspended system", 4096 - 10, b"S1SUSPEND"),
    Magic("a suspended system", 4096 - 10, b"S2SUSPEND"),
    Magic("a suspended system", 4096 - 10, b"LINHIB0001"),
    Magic("an ISO 9660 image", 0x8001, b"CD001"),
    Magic("a UDF file system", 0x8001, b"BEA01"),
    Magic("a UDF file system", 0x8001, b"NSR02"),
    Magic("a bcache device", 4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    Magic(
        "a bcachefs file system",
        4096 + 24,
        b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef",
    ),
    Magic("a VMFS volume", MIB, &[0x0d, 0xd0, 0x01, 0xc0]),
    Magic("a VMFS file system", 2 * MIB, &[0x5e, 0xf1, 0xab, 0x2f]),
    Magic("a squashfs image", 0, b"hsqs"),
    Magic("a squashfs image", 0, b"sqsh"),
    Magic("an erofs image", 1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
    Magic("an F2FS file system", 1024, &[0x10, 0x20, 0xf5, 0xf2]),
    Magic("a JFS file system", 32 * KIB, b"JFS1"),
    Magic("a ReiserFS file system", 64 * KIB + 0x34, b"ReIsEr"),
    Magic("a ReiserFS file system", 8 * KIB + 0x34, b"ReIsEr"),
    Magic("an OCFS2 file system", 8192, b"OCFSV2"),
    Magic("a GFS2 file system", 64 * KIB, &[0x01, 0x16, 0x19, 0x70]),
    Magic("an HFS+ file system", 1024, b"H+\0\x04"),
    Magic("an HFSX file system", 1024, b"HX\0\x05"),
    Magic("an APFS container", 32, b"NXSB"),
    Magic("a Ceph BlueStore device", 0, b"bluestore block device"),
    Magic("a VDO volume", 0, b"dmvdo001"),
    Magic("a qcow2 image", 0, b"QFI\xfb"),
    Magic("a VMDK image", 0, b"KDMV"),
    Magic("a VHDX image", 0, b"vhdxfile"),
];

/// Everything that is recognised on a device of `size` bytes, from its beginning to its end.
///
/// # Errors
/// When the device cannot be read.
pub(super) fn scan(file: &File, size: u64) -> io::Result<Vec<Signature>> {
    let mut found = Vec::new();
    for &Magic(name, offset, magic) in MAGICS {
        note(file, size, name, offset, magic, &mut found)?;
    }
    scan_end(file, size, &mut found)?;
    scan_zfs(file, size, &mut found)?;
    found.sort_by_key(|signature| signature.offset);
    Ok(found)
}

/// Formats that keep their metadata at the end, where its place depends on the size.
fn scan_end(file: &File, size: u64, found: &mut Vec<Signature>) -> io::Result<()> {
    let from_end = |distance: u64| size.checked_sub(distance);
    for sector in [512, 4096] {
        if let Some(offset) = from_end(sector) {
            note(file, size, "a GPT partition table (backup)", offset, b"EFI PART", found)?;
        }
    }
    // MD 0.90: the last whole 64 KiB that has 64 KiB behind it; its magic is in the byte order of the machine.
    if let Some(offset) = (size & !(64 * KIB - 1)).checked_sub(64 * KIB) {
        for magic in [0xa92b_4efc_u32.to_le_bytes(), 0xa92b_4efc_u32.to_be_bytes()] {
            note(file, size, "a member of an MD RAID (version 0.90)", offset, &magic, found)?;
        }
    }
    // MD 1.0: 8 KiB from the end, rounded down to 4 KiB.
    if let Some(offset) = from_end(8 * KIB) {
        let magic = 0xa92b_4efc_u32.to_le_bytes();
        note(file, size, "a member of an MD RAID (version 1.0)", offset & !4095, &magic, found)?;
    }
    if let Some(offset) = (size & !4095).checked_sub(4096) {
        for magic in [0x8374_026b_u32, 0x8374_026c, 0x8374_026d] {
            note(file, size, "metadata of a DRBD device", offset + 60, &magic.to_be_bytes(), found)?;
        }
    }
    if let Some(offset) = from_end(1024) {
        note(file, size, "a member of an Intel RAID", offset, b"Intel Raid ISM Cfg Sig. ", found)?;
    }
    if let Some(offset) = from_end(512) {
        note(file, size, "a member of a DDF RAID", offset, &[0xde, 0x11, 0xde, 0x11], found)?;
    }
    Ok(())
}

/// ZFS keeps four labels of 256 KiB, two at each end, each with an array of uberblocks from its 128th KiB on.
fn scan_zfs(file: &File, size: u64, found: &mut Vec<Signature>) -> io::Result<()> {
    const LABEL: u64 = 256 * KIB;
    let end = size & !(LABEL - 1);
    let labels = [Some(0), Some(LABEL), end.checked_sub(2 * LABEL), end.checked_sub(LABEL)];
    let magics = [0x00ba_b10c_u64.to_le_bytes(), 0x00ba_b10c_u64.to_be_bytes()];
    let mut uberblocks = vec![0; 128 * 1024];
    for label in labels.into_iter().flatten() {
        let start = label + 128 * KIB;
        if start + 128 * KIB > size {
            continue;
        }
        file.read_exact_at(&mut uberblocks, start)?;
        let hit = uberblocks.chunks(1024).position(|u| magics.iter().any(|m| u.starts_with(m)));
        if let Some(index) = hit {
            found.push(Signature { name: "a ZFS pool member", offset: start + index as u64 * KIB });
        }
    }
    Ok(())
}

fn note(
    file: &File,
    size: u64,
    name: &'static str,
    offset: u64,
    magic: &[u8],
    found: &mut Vec<Signature>,
) -> io::Result<()> {
    if offset + magic.len() as u64 > size {
        return Ok(());
    }
    let mut bytes = [0; 32];
    let bytes = &mut bytes[..magic.len()];
    file.read_exact_at(bytes, offset)?;
    if bytes == magic {
        found.push(Signature { name, offset });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 80 * MIB + 8192;

    fn scan_with(places: &[(u64, &[u8])]) -> Vec<Signature> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        for (offset, bytes) in places {
            file.write_all_at(bytes, *offset).unwrap();
        }
        scan(&file, SIZE).unwrap()
    }

    #[test]
    fn every_known_magic_is_found_where_it_belongs_and_an_empty_device_has_none() {
        assert_eq!(scan_with(&[]), []);
        for Magic(name, offset, magic) in MAGICS {
            let found = scan_with(&[(*offset, magic)]);
            assert!(found.contains(&Signature { name, offset: *offset }), "{name}: {found:?}");
            // One byte less and it is not there: the whole magic is compared.
            assert_eq!(scan_with(&[(*offset, &magic[..magic.len() - 1])]), [], "{name}");
        }
    }

    #[test]
    fn metadata_at_the_end_of_a_device_are_found() {
        let md = 0xa92b_4efc_u32;
        for (offset, magic, word) in [
            (SIZE - 512, b"EFI PART".to_vec(), "GPT"),
            (SIZE - 4096, b"EFI PART".to_vec(), "GPT"),
            ((SIZE & !65535) - 65536, md.to_le_bytes().to_vec(), "0.90"),
            ((SIZE & !65535) - 65536, md.to_be_bytes().to_vec(), "0.90"),
            (SIZE - 8192, md.to_le_bytes().to_vec(), "1.0"),
            (SIZE - 4096 + 60, 0x8374_026b_u32.to_be_bytes().to_vec(), "DRBD"),
            (SIZE - 1024, b"Intel Raid ISM Cfg Sig. ".to_vec(), "Intel"),
            (SIZE - 512, vec![0xde, 0x11, 0xde, 0x11], "DDF"),
        ] {
            let found = scan_with(&[(offset, &magic)]);
            assert!(found.len() == 1 && found[0].name.contains(word), "{word}: {found:?}");
        }
    }

    #[test]
    fn a_zfs_label_is_found_in_any_of_its_four_places() {
        let uberblock = 0x00ba_b10c_u64.to_le_bytes();
        let end = SIZE & !(256 * KIB - 1);
        for label in [0, 256 * KIB, end - 512 * KIB, end - 256 * KIB] {
            for index in [0, 5, 127] {
                let offset = label + 128 * KIB + index * KIB;
                let found = scan_with(&[(offset, &uberblock)]);
                assert_eq!(found, [Signature { name: "a ZFS pool member", offset }]);
            }
        }
    }

    #[test]
    fn devices_smaller_than_any_format_are_scanned_without_error() {
        for size in [0, 1, 511, 512, 4095, 65536, 300 * KIB] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(size).unwrap();
            assert_eq!(scan(&file, size).unwrap(), []);
        }
    }
}
