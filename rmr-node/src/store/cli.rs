//! `store create | inspect | destroy`: the offline commands on a single store.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use rmr_common::pool::{
    Address, ChunkSize, Epoch, MAX_MEMBERS, MemberId, MemberSpec, PoolId, PoolSpec, StoreId, View,
};
use uuid::Uuid;

use super::create::{CreateOptions, ZeroPolicy};
use super::open::Store;
use super::size::ByteSize;

/// Work on one store, offline.
#[derive(Subcommand, Clone, Debug)]
pub enum StoreCommand {
    /// Make a device or file a store: one member of a pool
    ///
    /// Usually `rmrctl pool create` does this on all nodes at once. By hand, run it on each node with the same pool, size
    /// and members; the first run invents the identities and prints the commands for the other nodes.
    ///
    /// A file that does not exist is created, sparse, with the size that the store needs. A device or file that holds
    /// anything recognisable, or that somebody uses, is refused and left as it is.
    #[command(after_help = "Example: a pool of two members, this node being member 0:
  rmr-node store create /dev/vg0/vm1 --pool vm1 --size 10G --member 0=10.0.0.1:7700 --member 1=10.0.0.2:7700 --this 0")]
    Create(CreateArgs),
    /// Print all that a store says; changes nothing and needs no running node
    ///
    /// Shows both superblock copies, the pool and its members, the view, the last client, and the health and content of
    /// every map. Works on damaged stores; exits with an error when the store could not be opened.
    Inspect(InspectArgs),
    /// Make a store unusable for ever
    ///
    /// Wipes the superblocks and maps. The data area is not wiped; a file is not removed.
    Destroy(DestroyArgs),
    /// Take back an epoch that a faulty client has raised so far that no client can attach any more
    ///
    /// Clients then say that they wait for a branch that was forced into use and that nobody has, or that an epoch cannot
    /// follow another one. Try `rmrctl pool force-from` first; if that is refused too, stop the nodes of all members, run
    /// this on the store of each with the same --epoch, and start them again.
    ///
    /// WHAT MAY BE LOST: each store forgets that a client attached under a higher epoch. A daemon that is still running
    /// under that epoch is not kept out any more, and what it completed on members that are not reset may be overwritten
    /// by a resync. So no client of the pool may run anywhere, and no member may be left out that is current.
    #[command(after_help = "Example: on each node, with the node stopped:
  rmr-node store reset-epoch /var/lib/rmr/vm1.store --pool-id UUID --epoch 1000 --yes-no-client-runs")]
    ResetEpoch(ResetEpochArgs),
}

/// Arguments of `store create`.
#[derive(Args, Clone, Debug)]
pub struct CreateArgs {
    /// Block device or file
    pub path: PathBuf,
    /// Name of the pool
    #[arg(long, value_name = "NAME")]
    pub pool: String,
    /// Size of the pool, e.g. 10G
    #[arg(long)]
    pub size: ByteSize,
    /// Unit of dirty tracking on disk: a power of two from 64K to 64M
    #[arg(long, default_value = "1M", value_name = "SIZE")]
    pub chunk_size: ByteSize,
    /// Logical block size that guests see: 512 or 4096. Not smaller than the sectors of any member's disk
    #[arg(long, default_value_t = 512, value_name = "BYTES")]
    pub block_size: u32,
    /// A member: its number, 0 to 7, and where its node listens; once for each
    #[arg(long = "member", required = true, value_name = "ID=ADDRESS")]
    pub members: Vec<Assignment<Address>>,
    /// Which member this store is
    #[arg(long, value_name = "ID")]
    pub this: u8,
    /// Identity of the pool, the same on all nodes [default: a new one]
    #[arg(long, value_name = "UUID")]
    pub pool_id: Option<Uuid>,
    /// Identity of a member's store, the same on all nodes; once for each [default: new ones]
    #[arg(long = "store-id", value_name = "ID=UUID")]
    pub store_ids: Vec<Assignment<Uuid>>,
    /// Largest size that the pool may grow to later [default: 8 times its size]
    #[arg(long, value_name = "SIZE")]
    pub max_size: Option<ByteSize>,
    /// The device is known to read as zeroes: do not write them. If it does not, members differ and verification fails
    #[arg(long)]
    pub assume_zero: bool,
    /// Destroy whatever is on the device or in the file
    #[arg(long)]
    pub overwrite: bool,
}

/// Arguments of `store inspect`.
#[derive(Args, Clone, Debug)]
pub struct InspectArgs {
    /// Block device or file
    pub path: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `store destroy`.
#[derive(Args, Clone, Debug)]
pub struct DestroyArgs {
    /// Block device or file
    pub path: PathBuf,
    /// Destroy it only if it belongs to this pool
    #[arg(long, value_name = "UUID")]
    pub pool_id: Option<Uuid>,
    /// Yes, this member's data may be lost for ever
    #[arg(long)]
    pub yes_destroy_all_data: bool,
}

/// Arguments of `store reset-epoch`.
#[derive(Args, Clone, Debug)]
pub struct ResetEpochArgs {
    /// Block device or file
    pub path: PathBuf,
    /// The pool that the store belongs to
    #[arg(long, value_name = "UUID")]
    pub pool_id: Uuid,
    /// The epoch to put in its place, the same for all members: above that of every view that a client made before the
    /// faulty one came, as `store inspect` shows them
    #[arg(long, value_name = "NUMBER")]
    pub epoch: u64,
    /// Yes, no client of the pool runs anywhere, and what one may have written since may be lost
    #[arg(long)]
    pub yes_no_client_runs: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `ID=VALUE`, for a member.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Assignment<T> {
    /// The member.
    pub member: MemberId,
    /// What it is given.
    pub value: T,
}

impl<T: FromStr<Err: std::fmt::Display>> FromStr for Assignment<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (id, value) = text.split_once('=').ok_or_else(|| format!("'{text}': expected ID=VALUE"))?;
        let member = id.parse().ok().and_then(MemberId::new);
        let member =
            member.ok_or_else(|| format!("'{id}' is no member: expected 0 to {}", MAX_MEMBERS - 1))?;
        Ok(Self { member, value: value.parse().map_err(|error| format!("{error}"))? })
    }
}

impl StoreCommand {
    /// Does it, and prints what came of it.
    ///
    /// # Errors
    /// When it was not done; the store is then as it was, unless the device failed.
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Create(args) => create(&args),
            Self::Inspect(args) => inspect(&args),
            Self::Destroy(args) => destroy(&args),
            Self::ResetEpoch(args) => reset_epoch(&args),
        }
    }
}

fn create(args: &CreateArgs) -> anyhow::Result<()> {
    let spec = spec(args)?;
    let member = MemberId::new(args.this)
        .and_then(|id| spec.member(id))
        .with_context(|| format!("--this {}: there is no --member {}=ADDRESS", args.this, args.this))?;
    let options = CreateOptions {
        member: member.id,
        store: member.store,
        view: View::initial(spec.members.iter().map(|m| (m.id, m.store))),
        overwrite: args.overwrite,
        zero: if args.assume_zero { ZeroPolicy::AssumeZero } else { ZeroPolicy::Zero },
        max_size: args.max_size.map(|size| size.0),
        spec: spec.clone(),
    };
    let show = std::io::stderr().is_terminal();
    let mut progress = |done: u64, total: u64| {
        if show {
            // Nobody has to watch.
            let _ = write!(std::io::stderr(), "\rzeroing: {} of {} MiB", done >> 20, total >> 20);
            if done == total {
                let _ = writeln!(std::io::stderr());
            }
        }
    };
    let superblock = Store::create(&args.path, &options, &mut progress)?;
    let mut out = std::io::stdout().lock();
    let needed = superblock.layout.store_size(spec.size);
    writeln!(
        out,
        "{}: store {} is member {} of pool '{}' ({}), {} with {} of metadata",
        args.path.display(),
        superblock.store,
        superblock.member,
        spec.name,
        spec.id,
        ByteSize(needed),
        ByteSize(superblock.layout.data_offset),
    )?;
    let invented = args.pool_id.is_none() || args.store_ids.len() < spec.members.len();
    if invented && spec.members.len() > 1 {
        writeln!(out, "On the nodes of the other members, with their own PATH:")?;
        for other in spec.members.iter().filter(|m| m.id != superblock.member) {
            writeln!(out, "  rmr-node store create PATH {}", arguments(args, &spec, other.id))?;
        }
    }
    Ok(())
}

fn spec(args: &CreateArgs) -> anyhow::Result<PoolSpec> {
    let mut members: Vec<MemberSpec> = Vec::new();
    for Assignment { member, value } in &args.members {
        let given = args.store_ids.iter().find(|s| s.member == *member);
        let store = given.map_or_else(StoreId::random, |s| StoreId(s.value));
        members.push(MemberSpec::new(*member, store, value.clone()));
    }
    members.sort_by_key(|m| m.id);
    for (i, given) in args.store_ids.iter().enumerate() {
        ensure!(
            members.iter().any(|m| m.id == given.member),
            "--store-id {}=…: there is no --member {}=ADDRESS",
            given.member,
            given.member
        );
        let again = args.store_ids[..i].iter().any(|other| other.member == given.member);
        ensure!(!again, "--store-id is given twice for member {}", given.member);
    }
    let spec = PoolSpec {
        id: args.pool_id.map_or_else(PoolId::random, PoolId),
        name: args.pool.clone(),
        size: args.size.0,
        chunk_size: ChunkSize::from_bytes(args.chunk_size.0)?,
        logical_block_size: args.block_size,
        members,
    };
    spec.validate()?;
    Ok(spec)
}

/// The arguments that create another member's store of the same pool.
fn arguments(args: &CreateArgs, spec: &PoolSpec, this: MemberId) -> String {
    let mut text = format!(
        "--pool {} --pool-id {} --size {} --chunk-size {} --block-size {} --this {this}",
        spec.name,
        spec.id,
        spec.size,
        spec.chunk_size.bytes(),
        spec.logical_block_size
    );
    if let Some(max_size) = args.max_size {
        text += &format!(" --max-size {}", max_size.0);
    }
    for member in &spec.members {
        text += &format!(" --member {0}={1} --store-id {0}={2}", member.id, member.address, member.store);
    }
    text
}

fn inspect(args: &InspectArgs) -> anyhow::Result<()> {
    let report = Store::inspect(&args.path)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
    } else {
        write!(out, "{report}")?;
    }
    ensure!(report.superblock.is_some(), "{}: this is no store that could be opened", show(&args.path));
    Ok(())
}

fn destroy(args: &DestroyArgs) -> anyhow::Result<()> {
    if !args.yes_destroy_all_data {
        let report = Store::inspect(&args.path)?;
        let what = report.superblock.map_or_else(
            || "it does not look like a store".to_owned(),
            |s| format!("it is member {} of pool '{}' ({})", s.member, s.spec.name, s.spec.id),
        );
        bail!("{}: {what}; nothing was done. To destroy it, add --yes-destroy-all-data", show(&args.path));
    }
    let superblock = Store::destroy(&args.path, args.pool_id.map(PoolId))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}: store {} is destroyed", show(&args.path), superblock.store)?;
    Ok(())
}

fn reset_epoch(args: &ResetEpochArgs) -> anyhow::Result<()> {
    if !args.yes_no_client_runs {
        let report = Store::inspect(&args.path)?;
        let what = report.superblock.map_or_else(
            || "it does not look like a store".to_owned(),
            |s| {
                format!(
                    "it is member {} of pool '{}' ({}), its newest epoch accepted is {}, and it has {}",
                    s.member, s.spec.name, s.spec.id, s.epoch, s.view
                )
            },
        );
        bail!(
            "{}: {what}; nothing was done. To take the epoch back, see to it that no client of the pool runs anywhere, and \
             add --yes-no-client-runs",
            show(&args.path)
        );
    }
    let (before, after) = Store::reset_epoch(&args.path, PoolId(args.pool_id), Epoch(args.epoch))?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let line = |s: &super::Superblock| serde_json::json!({ "epoch": s.epoch, "view": s.view });
        let both = serde_json::json!({
            "store": before.store, "pool": before.spec.id, "before": line(&before), "after": line(&after),
        });
        serde_json::to_writer_pretty(&mut out, &both)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(
        out,
        "{}: member {} of pool '{}': the newest epoch accepted was {}, and is {}; it had {}, and has {}",
        show(&args.path),
        after.member,
        after.spec.name,
        before.epoch,
        after.epoch,
        before.view,
        after.view
    )?;
    writeln!(out, "Do the same, with the same --epoch, for every other member before any node is started.")?;
    Ok(())
}

fn show(path: &Path) -> std::path::Display<'_> {
    path.display()
}
