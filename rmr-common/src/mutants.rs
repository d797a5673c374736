//! Deliberate mistakes in the protocol code, which the simulator has to find: `make sim-mutants`.
//!
//! Each has a name and one place (or the few places that guard the same thing) where `mutant!(Name)` asks whether it is
//! being made. Without the feature `mutants` that is the constant `false`, and nothing of this is compiled.

use std::cell::Cell;

thread_local! {
    static ACTIVE: Cell<Option<Mutant>> = Cell::new(of_environment());
}

/// The mistake that every thread begins with: `RMR_MUTANT` names it, for the unit tests that find it.
fn of_environment() -> Option<Mutant> {
    let name = std::env::var("RMR_MUTANT").ok()?;
    ALL.iter().copied().find(|mutant| format!("{mutant:?}") == name)
}

/// Makes a mistake in this thread, from now on; or none.
pub fn activate(mutant: Option<Mutant>) {
    ACTIVE.set(mutant);
}

/// Whether this mistake is being made.
pub(crate) fn is_active(mutant: Mutant) -> bool {
    ACTIVE.get() == Some(mutant)
}

macro_rules! mutants {
    ($($(#[doc = $text:literal])+ $name:ident,)+) => {
        /// A deliberate mistake.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Mutant {
            $($(#[doc = $text])+ $name,)+
        }

        /// Every mistake.
        pub const ALL: &[Mutant] = &[$(Mutant::$name,)+];

        impl Mutant {
            /// What is done wrong, in words.
            #[must_use]
            pub const fn description(self) -> &'static str {
                match self {
                    $(Self::$name => concat!($($text),+).trim_ascii(),)+
                }
            }
        }
    };
}

mutants! {
    // A member's writes.
    /// The intent bit of a write is set in memory only
    IntentNotDurable,
    /// The dirty bits of a write are set in memory only
    DirtyBitsNotDurable,
    /// A write goes to disk while the pages with its bits are on their way
    WriteBeforeBitsDurable,
    /// A write does not wait for bits that an earlier one set and that are on their way
    BitsOnTheirWayCount,
    /// A write is answered before the disk has ended it
    AnswerBeforeWritten,
    /// A write that the disk failed is answered well
    FailedWriteAnsweredWell,
    /// The slot table keeps the older of two writes
    SlotKeepsTheOlder,
    /// A metadata write that failed counts as durable
    MetadataErrorIgnored,

    // Intents.
    /// An intent bit is cleared while its write is not complete everywhere
    WatermarkIgnored,
    /// An intent bit is cleared without a flush
    IntentClearedUnflushed,
    /// An intent bit is cleared though its chunk was written during the flush
    IntentClearedAfterNewWrite,
    /// A member's process that was started anew says that it has its slot table
    RestartNotTold,
    /// An attach is answered without the intent map
    IntentsNotTold,

    // Attach and views at a member.
    /// An attach with an older epoch is accepted
    OldEpochAccepted,
    /// Another client is let in under the present epoch
    EqualEpochAccepted,
    /// A live client is displaced by one that did not ask to
    TakeoverNotNeeded,
    /// The connection of the client that was displaced stays open
    OldConnectionStaysOpen,
    /// Requests of a client that was displaced are carried out
    FencedRequestsAccepted,
    /// An attach is answered while disk requests of the old client are under way
    AttachBeforeDrained,
    /// An attach is answered before its epoch is durable
    AttachBeforeDurable,
    /// An attach to a write-back store is answered without a flush
    AttachWithoutFlush,
    /// An attach with any epoch is accepted, so that none may be left for those that follow
    AnyEpochAccepted,
    /// A view is answered before it is durable
    ViewBeforeDurable,
    /// A view is adopted before the dirty bits that came with it are durable
    ViewBeforeDirtyBits,
    /// What a view says to be missed is not recorded
    AdditionsIgnored,
    /// A view clears the maps of members that are Syncing in it
    SyncingMapCleared,
    /// A Syncing member takes over maps with every view, without a barrier
    HandoverWithEachView,
    /// A detach clears intents without a flush
    DetachWithoutFlush,

    // Failed flushes.
    /// A member's own flush that failed before intents are cleared is repeated and believed
    OwnFlushRepeated,
    /// A flush that failed in an attach is repeated by the next attach and believed
    AttachFlushRepeated,
    /// A flush that failed before a report of a resync is repeated and believed
    ResyncFlushRepeated,
    /// A detach whose flush failed counts as one in good order
    FailedDetachInOrder,
    /// A member whose flush failed keeps its session
    FailedFlushKeepsSession,
    /// A member whose flush failed keeps its slot table
    FailedFlushKeepsTable,
    /// A member whose flush failed tells its next client that its table is lost, and not that its cache is
    FailedFlushNotTold,
    /// A member whose flush failed goes on as a source
    SourceServesAfterFailedFlush,
    /// A flush that failed on the only Clean member is repeated and believed
    LastFlushRepeated,

    // Resync at a member.
    /// A member goes Syncing with the maps that it has
    NoHandover,
    /// A member takes over its own map, and not those of others
    HandoverOfOwnMapOnly,
    /// What came with the view of a rejoin is lost in the handover
    HandoverForgetsAdditions,
    /// A block counts as current when a write to it begins
    FreshBeforeWritten,
    /// A write to a part of a stale block does not wait, and the block counts as current
    FreshWhenPartlyWritten,
    /// A block counts as current though its pulled data could not be written
    FreshWhenPullFailed,
    /// A chunk counts as current with its first block
    ChunkFreshWithOneBlock,
    /// Pulled data is written while a guest write to the block is with the disk
    PulledOverGuestWrite,
    /// A guest write does not wait for pulled data that is being written to its range
    GuestWriteOverPulled,
    /// A guest write to a part of a stale block does not wait for the rest
    PartialWriteNotHeld,
    /// Zeroes that are pulled are written, and not discarded
    ZeroesWritten,
    /// Chunks are reported as current before they are flushed
    ReportBeforeFlush,
    /// Chunks are reported as current though their flush failed
    ReportAfterFailedFlush,
    /// A Syncing member serves as a source
    PullFromStale,
    /// A member that has started anew serves as a source before its client has noticed
    SourceStartedAnew,

    // The client's attach and views.
    /// A link to a member's node is its leg, whatever the member's address says
    AnyBinding,
    /// An attach goes on with one Clean member of the highest view
    RecoveryIgnoresAMember,
    /// The view of the highest number counts as the latest, whoever made it
    ViewsByNumberOnly,
    /// A client goes on after another one had the pool
    DisplacedGoesOn,
    /// A view is committed with its first answer
    CommitWithoutAll,
    /// A Clean member that has not heard of a loss stays Clean, without a record of what the lost member misses
    DeafStaysClean,
    /// A promotion that is not committed is kept in the next view
    PromotionKept,
    /// Writes in flight to a member that is lost are forgotten
    InFlightForgotten,
    /// Unflushed blocks of a lost write-back store are forgotten
    UnflushedForgotten,

    // After a client's death.
    /// No member is brought in line after a client died
    NotReconciled,
    /// Writes that a member's disk failed are not told to the next client
    FailedWriteNotTold,
    /// A write that a member's disk failed counts as one that it has
    FailedCountsAsWritten,
    /// A Syncing member that has not heard of the last view stays Syncing
    BehindStays,
    /// That a new store has nothing is not told again after a view that was given up half-way
    NewStoreNotTold,
    /// A member that lost power, and its cache with it, is the reference
    PowerLossIgnored,
    /// Writes that only the other member has are not brought in line
    OnlyReferenceCounts,
    /// What members that are Out miss of writes in flight is not recorded
    AbsentNotTold,
    /// What a member has of an earlier attachment is not looked at when it rejoins
    LeftBehindIgnored,
    /// What a view said that was given up half-way is not told again
    GivenUpViewForgotten,

    // Forced by the operator.
    /// A forced attachment has the next epoch, as any other
    ForcedEpochNotRaised,
    /// The forced epoch is durable with the attach, before there is a view of it
    ForcedEpochAtAttach,
    /// The forced view does not say that the others miss everything
    ForcedOthersNotStale,
    /// A client forces its member into use whenever it attaches
    ForcedAgain,
    /// A client goes on with an older branch though a node has met a client of a later one
    LaterBranchIgnored,
    /// A client that meets a node which knows of a later branch lives on
    OlderBranchLives,
    /// A member is not taken from a live client of an older branch
    OlderBranchKeepsMembers,

    // The data path.
    /// Overlapping writes are sent at once
    OverlapsNotSerialised,
    /// A write completes with the first answer
    WriteByOneLeg,
    /// A write that a lost leg did not answer completes before the view that says so is committed
    CompleteBeforeCommit,
    /// Reads go to Syncing members too
    ReadFromSyncing,
    /// A read overtakes a write that a view change caught
    ReadPassesBarrier,
    /// The watermark passes writes in flight
    WatermarkTooHigh,
    /// The watermark passes a write that was given up, and members take it from a view that is not committed
    UnsettledForgotten,
    /// A write whose memory could not be read fails with what each leg happened to get
    FaultedWriteNotRepeated,
    /// Members that completed a write whose memory could not be read are taken for equal after it was given up
    UnlikeForgotten,
    /// A flush completes with the first answer
    FlushByOneLeg,
    /// A flush covers what was written while it was under way
    FlushCoversTooMuch,

    // Sick members.
    /// A failed rejoin does not make the pause before the next one longer
    BackoffNotDoubled,
    /// A member that is brought in has no failures on record any more, however soon it is lost again
    BackoffResetByFlap,
    /// A member that is brought in may hold requests for as long as it likes
    HoldNotBounded,
    /// A member may delay requests for the leg timeout again and again
    StallsForgiven,
    /// Requests count as new for the suspend timeout with each attachment that breaks down
    SuspensionResets,
    /// A node that stops claims to have flushed, and has not
    GoodbyeWithoutFlush,

    // Rejoin and promotion.
    /// A member rejoins while writes are in flight
    NoBarrier,
    /// A member is promoted with its first report
    PromotedWhileStale,
    /// A write that a leg refused for its digest is repeated after the barrier of a rejoin
    RepeatAfterBarrier,

    // Stores that go back in time.
    /// A mark is answered before it is durable
    MarkBeforeDurable,
    /// An intent bit is cleared before a mark covers the write on every member
    IntentClearedUnsettled,
    /// A member is promoted though no mark covers what it reported last
    PromotedUnmarked,
    /// A client leaves in good order without a mark that covers its last writes
    DetachedUnmarked,
    /// A member that shows less than it had is believed
    RegressionIgnored,
    /// A member that shows less than it had misses no more than is on record
    RegressedNotStale,
    /// The others go on without proof that nothing later is lost with a member that went back in time
    LostHistoryNotProved,
    /// A member of which no committed view says that it is Clean proves that nothing later is lost
    PromotionProves,
    /// What a rejoin found that was broken off is forgotten with the next attachment
    FoundInRejoinForgotten,
    /// A member that was away when a client had died misses nothing of what only the reference's intents tell
    AbsentIntentsIgnored,
    /// A store that was put back in the place of one that went back counts as that one
    RightStoreRefused,
    /// What a node said of another one's history is forgotten with the connection to it
    HeardForgotten,
    /// A client attaches before it has asked every address that it was given
    StrangersNotAsked,
    /// A member without its table misses nothing of what only the reference's intents tell
    ReferenceIntentsIgnored,
}
