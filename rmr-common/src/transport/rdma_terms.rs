//! What builds with and without RDMA have words for: limits of the transport, and the choices of who configures it.

/// Largest piece of slot memory that is lent at once, in bytes: what the number in an RDMA write can name.
pub const MAX_WINDOW: u32 = 1 << 20;
/// Least piece of slot memory that is lent, in bytes.
pub const MIN_WINDOW: u32 = 64 << 10;
/// Most pieces of slot memory that one connection is lent at a time.
pub const MAX_WINDOWS: usize = 256;
/// Most bytes of data in one message over RDMA: three fit a window of 1 MiB with what goes behind them.
pub const MAX_IO: u32 = 256 << 10;

/// Who may write to registered memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exposure {
    /// Nobody but this process: data leaves it, and comes into it by copies.
    Local,
    /// Peers that were given the key, too.
    Peers,
    /// Peers, but only in pieces of it for which a memory window was bound, each by a key of its own.
    Windows,
}

/// How the data of a read comes into the memory of whoever asked.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReadMode {
    /// The node writes it there: the node is given the key of that memory.
    #[default]
    Direct,
    /// The node writes it there, by a key that reaches that memory alone and is invalid before the read completes.
    Window,
    /// The node writes it to memory of this process, which copies it: no key of other memory leaves the host.
    Bounce,
}

/// By which key, and where to, somebody writes a page. The window is bound to the second page of three.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyUse {
    /// Where the window is: the only one that is right.
    Within,
    /// From the window's second byte on, so that the last one lies beyond it.
    BeyondEnd,
    /// The last byte before the window, and all of it but its last.
    BeforeBegin,
    /// So that the last byte lies beyond the memory that the window was bound to a part of.
    BeyondRegion,
    /// Where the window is, over another connection between the same two.
    OtherConnection,
    /// Where the window is, when its key was made invalid.
    AfterEnd,
    /// Where the window is, by the key of the memory that the window was bound to.
    KeyOfRegion,
}

impl KeyUse {
    /// All of them, the right one first.
    pub const ALL: [Self; 7] = [
        Self::Within,
        Self::BeyondEnd,
        Self::BeforeBegin,
        Self::BeyondRegion,
        Self::OtherConnection,
        Self::AfterEnd,
        Self::KeyOfRegion,
    ];
}

/// What became of a write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyOutcome {
    /// The card's words, if it refused the write.
    pub refused: Option<String>,
    /// Bytes that were changed.
    pub changed: usize,
}
