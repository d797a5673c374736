//! Which data is stale or may be incomplete: bitmaps per block in memory and per chunk on disk.
//!
//! [`BlockMap`] is sparse, for block-exact sets in memory. [`ChunkMap`] is laid out in pages, as it stands on disk.
//! [`MemberMaps`] holds the maps of one member, and its [`MemberMaps::clear`] is the one place where a bit is cleared.

mod block_map;
mod chunk_map;
mod member_maps;

pub use block_map::BlockMap;
pub use chunk_map::{ChunkMap, MAP_PAGE_BITS, MAP_PAGE_BYTES};
pub use member_maps::{ClearReason, ClearTarget, MapId, MapPage, MemberMaps};
