//! The commands that `rmrctl` tells an operator to run: complete, with the nodes and files of the present command line, and
//! quoted for a shell. All of them are made here, so that a test can give each to the program.

use std::path::Path;

use rmr_common::pool::{MemberId, PoolId};

use super::args::Cli;
use super::http::NodeAddress;

/// How this program is called for one pool.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Advice {
    nodes: Vec<NodeAddress>,
    /// Other options of every command.
    options: Vec<String>,
    /// The pool, by a name that nothing else has.
    pool: String,
}

impl Advice {
    /// With the options of a command line.
    #[must_use]
    pub(super) fn new(cli: &Cli) -> Self {
        let files = [
            ("--key-file", &cli.key_file),
            ("--tls-authorities", &cli.tls_authorities),
            ("--tls-certificate", &cli.tls_certificate),
            ("--tls-key", &cli.tls_key),
        ];
        let given = files.into_iter().filter_map(|(flag, path)| Some((flag, path.as_ref()?)));
        let options = given.flat_map(|(flag, path)| [flag.to_owned(), path.display().to_string()]).collect();
        Self { nodes: super::once_each(&cli.nodes), options, pool: String::new() }
    }

    /// For a pool without options of a command line.
    pub(super) fn for_pool(pool: impl ToString) -> Self {
        Self { pool: pool.to_string(), ..Self::default() }
    }

    /// The same for another pool.
    pub(super) fn of(&self, pool: impl ToString) -> Self {
        Self { pool: pool.to_string(), ..self.clone() }
    }

    /// With one more node.
    fn with(&self, node: &NodeAddress) -> Self {
        let nodes = if self.nodes.is_empty() { vec![NodeAddress::local()] } else { self.nodes.clone() };
        let nodes = super::once_each(&[nodes, vec![node.clone()]].concat());
        Self { nodes, ..self.clone() }
    }

    fn command(&self, words: &[&str]) -> String {
        let nodes = self.nodes.iter().flat_map(|node| ["--node".to_owned(), node.to_string()]);
        let words = words.iter().map(|&word| word.to_owned());
        let all = nodes.chain(self.options.iter().cloned()).chain(words);
        let quoted: Vec<_> = all.map(|word| quote(&word)).collect();
        format!("rmrctl {}", quoted.join(" "))
    }

    /// Brings all copies up to date.
    pub(super) fn resync(&self) -> String {
        self.command(&["pool", "resync", &self.pool])
    }

    /// Ends the maintenance of a member.
    pub(super) fn maintenance_off(&self, member: MemberId) -> String {
        self.command(&["pool", "maintenance", &self.pool, &member.to_string(), "off"])
    }

    /// Removes a member, or what is left of it on a node that may not be among those asked.
    pub(super) fn remove_member(&self, member: MemberId, node: Option<&NodeAddress>) -> String {
        let options = node.map_or_else(|| self.clone(), |node| self.with(node));
        options.command(&["pool", "remove-member", &self.pool, &member.to_string(), "--delete-store"])
    }

    /// Puts a new store into the place of a member's old one.
    pub(super) fn replace(&self, member: MemberId, node: &NodeAddress, path: Option<&Path>) -> String {
        let at = path.map(|path| format!("={}", path.display())).unwrap_or_default();
        let (member, place) = (member.to_string(), format!("{node}{at}"));
        self.command(&["pool", "replace", &self.pool, &member, "--member", &place])
    }

    /// Tells the pool where the nodes are that were asked.
    pub(super) fn member_address(&self) -> String {
        self.command(&["member", "address", &self.pool])
    }

    /// Closes the store at a path of one node, which is that of a member in use.
    pub(super) fn close_store(&self, node: &NodeAddress, path: &Path) -> String {
        let only = Self { nodes: vec![node.clone()], ..self.clone() };
        only.command(&["store", "close", &path.display().to_string(), "--force"])
    }

    /// Deletes the store at a path of one node.
    pub(super) fn delete_store(&self, node: &NodeAddress, path: &Path) -> String {
        let only = Self { nodes: vec![node.clone()], ..self.clone() };
        only.command(&["store", "delete", &path.display().to_string(), "--yes-destroy-all-data"])
    }

    /// As a node says it, of a store of its own: to be run there, or with the node named.
    pub(crate) fn delete_store_here(path: &Path) -> String {
        let path = path.display().to_string();
        Self::default().command(&["store", "delete", &path, "--yes-destroy-all-data"])
    }

    /// The same: closes a store.
    pub(crate) fn close_store_here(path: &Path) -> String {
        Self::default().command(&["store", "close", &path.display().to_string()])
    }

    /// The same: shows the stores.
    pub(crate) fn list_stores_here() -> String {
        Self::default().command(&["store", "list"])
    }

    /// The same: takes a member out by plan.
    pub(crate) fn maintenance_on(pool: &str, member: MemberId) -> String {
        Self::default().command(&["pool", "maintenance", pool, &member.to_string(), "on"])
    }

    /// The same: tells a pool where its nodes are now.
    pub(crate) fn addresses_of(pool: &str) -> String {
        Self::for_pool(pool).member_address()
    }

    /// Shows how a verify goes.
    pub(super) fn verify_status(&self) -> String {
        self.command(&["pool", "verify-status", &self.pool])
    }

    /// Ends a verify.
    pub(super) fn verify_cancel(&self) -> String {
        self.command(&["pool", "verify-cancel", &self.pool])
    }

    /// Removes what there is of a pool on one node, whatever other nodes have.
    pub(super) fn delete_on(node: &NodeAddress, pool: PoolId) -> String {
        let only = Self { nodes: vec![node.clone()], ..Self::default() };
        only.command(&["pool", "delete", &pool.to_string(), "--force", "--yes-destroy-all-data"])
    }
}

/// A word as a shell takes it.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::ctl::{Command, PoolCommand};

    /// The words that a shell makes of a line.
    fn shell(line: &str) -> Vec<String> {
        let script = format!("set -- {line}\nprintf '%s\\0' \"$@\"");
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        text.trim_end_matches('\0').split('\0').map(str::to_owned).collect()
    }

    fn parse(line: &str) -> Cli {
        Cli::try_parse_from(shell(line)).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    #[test]
    fn what_is_advised_works_when_it_is_pasted() {
        let line = "rmrctl --node a --node '[fe80::1]:80' --key-file \"/etc/it's a key\" status";
        let given = parse(line);
        let advice = Advice::new(&given).of("vm-1");
        let (member, node) = (MemberId::new(3).unwrap(), "c:1".parse::<NodeAddress>().unwrap());
        let path = Path::new("/srv/a b/$HOME;`x`'\"*");
        let all = [
            advice.resync(),
            advice.maintenance_off(member),
            advice.remove_member(member, None),
            advice.remove_member(member, Some(&node)),
            advice.replace(member, &node, Some(path)),
            advice.verify_status(),
            advice.verify_cancel(),
            advice.member_address(),
        ];
        for line in &all {
            let cli = parse(line);
            assert!(given.nodes.iter().all(|node| cli.nodes.contains(node)), "{line}");
            assert_eq!(cli.key_file, given.key_file, "{line}");
        }
        assert_eq!(parse(&all[3]).nodes.last(), Some(&node));
        let Command::Pool(PoolCommand::Replace(args)) = parse(&all[4]).command else { panic!("{}", all[4]) };
        assert_eq!(args.member.path.as_deref(), Some(path));
        // A path is one of a node: no other one is named.
        for line in [advice.close_store(&node, path), advice.delete_store(&node, path)] {
            assert_eq!(parse(&line).nodes, std::slice::from_ref(&node), "{line}");
            assert_eq!(parse(&line).key_file, given.key_file, "{line}");
        }
        for line in [
            Advice::delete_store_here(path),
            Advice::close_store_here(path),
            Advice::list_stores_here(),
            Advice::maintenance_on("vm-1", member),
            Advice::addresses_of("vm-1"),
        ] {
            assert_eq!(parse(&line).nodes, [], "{line}");
        }
        let delete = Advice::delete_on(&node, PoolId::random());
        assert_eq!(parse(&delete).nodes, [node]);
        assert_eq!(Advice::for_pool("vm-1").resync(), "rmrctl pool resync vm-1");
    }

    /// Lines of the sources that are neither comments nor tests.
    fn sources() -> Vec<(String, String)> {
        fn walk(directory: &Path, found: &mut Vec<(String, String)>) {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    walk(&path, found);
                } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("ctl/advice.rs") {
                    let text = std::fs::read_to_string(&path).unwrap();
                    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
                    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
                    let name = path.display().to_string();
                    found.extend(lines.map(|line| (name.clone(), line.to_owned())));
                }
            }
        }
        let mut found = Vec::new();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for part in ["rmr-node/src", "rmr-common/src", "vhost-brmr/src"] {
            walk(&root.join(part), &mut found);
        }
        found.retain(|(name, _)| !name.contains("tests"));
        assert!(found.len() > 1000);
        found
    }

    #[test]
    fn no_command_is_advised_that_is_not_made_here() {
        // The help of the programs is theirs, and is looked at below.
        let help =
            ["ctl/args.rs", "ctl/change_args.rs", "store/cli.rs", "src/main.rs", "vhost-brmr/src/args.rs"];
        for (name, line) in sources() {
            if help.iter().any(|file| name.ends_with(file)) {
                continue;
            }
            for start in [
                "rmrctl pool",
                "rmrctl node",
                "rmrctl store",
                "rmrctl member",
                "rmrctl --",
                "rmr-node store",
                "rmr-node --",
                "vhost-brmr --",
            ] {
                assert!(!line.contains(start), "{name}: {line}");
            }
        }
    }

    #[test]
    fn every_option_that_is_advised_exists() {
        fn names(command: &clap::Command, found: &mut Vec<String>) {
            found.extend(command.get_arguments().filter_map(|a| a.get_long()).map(str::to_owned));
            command.get_subcommands().for_each(|c| names(c, found));
        }
        let mut known = Vec::new();
        names(&Cli::command(), &mut known);
        let node = <crate::config::Settings as clap::Args>::augment_args(clap::Command::new("rmr-node"));
        names(&node, &mut known);
        let store = clap::Command::new("store");
        names(&<crate::store::cli::StoreCommand as clap::Subcommand>::augment_subcommands(store), &mut known);
        // Options of vhost-brmr that are named in messages of the library.
        known.extend(["help", "config"].map(str::to_owned));
        for (name, line) in sources().iter().filter(|(name, _)| name.contains("rmr-node/src")) {
            let texts = line.split('"').skip(1).step_by(2);
            for rest in texts.flat_map(|text| text.match_indices("--").map(|(at, _)| &text[at + 2..])) {
                let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '-').unwrap_or(rest.len());
                let option = rest[..end].trim_end_matches('-');
                assert!(
                    option.is_empty() || known.iter().any(|k| k == option),
                    "{name}: --{option} in {line}"
                );
            }
        }
    }

    #[test]
    fn the_examples_of_every_help_work() {
        fn examples(command: &mut clap::Command, found: &mut Vec<String>) {
            let help = command.render_long_help().to_string();
            let lines = help.lines().map(str::trim);
            found.extend(
                lines.filter(|l| l.starts_with("rmrctl ") || l.starts_with("RMR_NODES=")).map(str::to_owned),
            );
            for sub in command.get_subcommands_mut() {
                examples(sub, found);
            }
        }
        let mut command = Cli::command();
        command.build();
        let mut found = Vec::new();
        examples(&mut command, &mut found);
        assert!(found.len() > 8, "{found:?}");
        for line in found {
            let words = shell(&line).into_iter().filter(|word| !word.starts_with("RMR_NODES="));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
    }
}
