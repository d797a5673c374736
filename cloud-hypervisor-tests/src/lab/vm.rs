//! A virtual machine with vhost-user disks: QEMU in software emulation, or cloud-hypervisor where it exists.
//! It boots the lab's guest image, and commands run in it through the guest's agent.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command as Program, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::guest::{Agent, Command, Image, Output};
use super::qmp::Qmp;
use super::workspace::{self, Lab};
use super::{Process, VmmApi, programs, sys};

/// Longest boot: an idle machine takes six seconds, a crowded one several times that.
const BOOT_LIMIT: Duration = Duration::from_secs(150);
/// Longest command unless the test says otherwise.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
/// Longest way down after `poweroff`.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(60);
/// How much of the boot log an error carries.
const BOOT_LOG_TAIL: u64 = 3 << 10;
/// Name of the port that the guest's agent looks for.
const AGENT_PORT: &str = "rmr.agent";

/// What runs the virtual machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Hypervisor {
    /// `qemu-system-x86_64` with emulated processors.
    Qemu,
    /// The cloud-hypervisor binary at this path, on KVM.
    CloudHypervisor(PathBuf),
}

impl Hypervisor {
    /// cloud-hypervisor as the environment variable `CLOUD_HYPERVISOR` names it; if there is none, says loudly that the
    /// test was not run.
    #[must_use]
    pub fn cloud_hypervisor_or_say_not_run(test: &str) -> Option<Self> {
        let missing = match std::env::var_os("CLOUD_HYPERVISOR").map(PathBuf::from) {
            None => "CLOUD_HYPERVISOR is not set to the path of a cloud-hypervisor binary".to_owned(),
            Some(path) if !path.is_file() => format!("CLOUD_HYPERVISOR={} is no file", path.display()),
            Some(_) if !Path::new("/dev/kvm").exists() => "there is no /dev/kvm".to_owned(),
            Some(path) => return Some(Self::CloudHypervisor(path)),
        };
        // Not by eprintln!, whose output is hidden for tests that pass.
        let _ = writeln!(std::io::stderr(), "\nNOT RUN (skipped): {test}: {missing}");
        None
    }
}

/// A vhost-user disk of a virtual machine.
#[derive(Clone, Debug)]
pub struct Disk {
    socket: PathBuf,
    queues: u16,
    queue_size: u16,
    reconnect: bool,
}

impl Disk {
    /// A disk served at `socket`, with one queue of 128 entries.
    #[must_use]
    pub fn vhost_user(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), queues: 1, queue_size: 128, reconnect: false }
    }

    /// Number of virtqueues; the guest's driver uses as many as it has processors.
    #[must_use]
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// Entries of each virtqueue.
    #[must_use]
    pub fn queue_size(mut self, entries: u16) -> Self {
        self.queue_size = entries;
        self
    }

    /// Lets QEMU connect again, once a second, when the back end goes away. cloud-hypervisor always does.
    #[must_use]
    pub fn reconnect(mut self) -> Self {
        self.reconnect = true;
        self
    }
}

/// A virtual machine to be.
#[derive(Clone, Debug)]
pub struct VmBuilder {
    name: String,
    hypervisor: Hypervisor,
    cpus: u16,
    memory_mib: u32,
    disks: Vec<Disk>,
    image: Option<Image>,
    arguments: Vec<String>,
}

impl VmBuilder {
    /// Two processors, 512 MiB, no disk, the standard image, on QEMU.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            hypervisor: Hypervisor::Qemu,
            cpus: 2,
            memory_mib: 512,
            disks: Vec::new(),
            image: None,
            arguments: Vec::new(),
        }
    }

    /// Runs on another hypervisor.
    #[must_use]
    pub fn hypervisor(mut self, hypervisor: Hypervisor) -> Self {
        self.hypervisor = hypervisor;
        self
    }

    /// Number of processors.
    #[must_use]
    pub fn cpus(mut self, cpus: u16) -> Self {
        self.cpus = cpus;
        self
    }

    /// Memory in MiB; the image itself needs about 250.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Adds a disk; the guest names them in this order, `vda` first.
    #[must_use]
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Boots another image than the standard one.
    #[must_use]
    pub fn image(mut self, image: Image) -> Self {
        self.image = Some(image);
        self
    }

    /// Adds arguments to the hypervisor's command line.
    #[must_use]
    pub fn arguments<A: Into<String>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Starts the machine and waits until the guest's agent answers.
    ///
    /// # Errors
    /// When something is missing on this machine, or the guest panics, stops or takes too long.
    pub fn boot(self, lab: &Lab) -> Result<Vm> {
        let started = Instant::now();
        let image = match &self.image {
            Some(image) => image.clone(),
            None => Image::standard()?,
        };
        let vm = match self.hypervisor.clone() {
            Hypervisor::Qemu => self.start_qemu(lab, &image)?,
            Hypervisor::CloudHypervisor(program) => self.start_cloud_hypervisor(lab, &image, &program)?,
        };
        let kernel =
            vm.agent.wait_ready(BOOT_LIMIT, || vm.check_alive()).with_context(|| vm.boot_log_tail())?;
        eprintln!(
            "lab: guest '{}' runs Linux {kernel} after {:.1} s",
            vm.name,
            started.elapsed().as_secs_f64()
        );
        Ok(vm)
    }

    /// Starts QEMU for a machine that comes by live migration from the socket at `from`; it runs when it is there. All but the
    /// name and the disks' sockets has to be as at the source.
    ///
    /// # Errors
    /// When something is missing on this machine, or QEMU does not start.
    pub fn receive(self, lab: &Lab, from: &Path) -> Result<Vm> {
        let image = match &self.image {
            Some(image) => image.clone(),
            None => Image::standard()?,
        };
        let incoming = ["-incoming".to_owned(), format!("unix:{}", from.display())];
        let vm = self.arguments(incoming).start_qemu(lab, &image)?;
        vm.process.wait_for_socket(from, BOOT_LIMIT)?;
        Ok(vm)
    }

    fn start_qemu(&self, lab: &Lab, image: &Image) -> Result<Vm> {
        let program = programs::system("qemu-system-x86_64")?;
        let version = qemu_version(&program)?;
        let (console, agent, control) = (
            lab.log(&format!("{}-console", self.name)),
            lab.path(self.file("agent")),
            lab.path(self.file("qmp")),
        );
        let mut qemu = Program::new(program);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", &self.cpus.to_string()])
            .args(["-m", &format!("{}M", self.memory_mib), "-machine", "q35,memory-backend=memory"])
            .args(["-object", &format!("memory-backend-memfd,id=memory,size={}M,share=on", self.memory_mib)])
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initramfs)
            .args(["-append", &kernel_arguments("ttyS0", AGENT_PORT)])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", control.display())])
            .args(["-chardev", &format!("socket,id=agent,path={},server=on,wait=off", agent.display())])
            .args(["-device", "virtio-serial-pci", "-device"])
            .arg(format!("virtserialport,chardev=agent,name={AGENT_PORT}"));
        for (number, disk) in self.disks.iter().enumerate() {
            let reconnect = match (disk.reconnect, version >= (9, 2)) {
                (false, _) => "",
                (true, true) => ",reconnect-ms=1000",
                (true, false) => ",reconnect=1",
            };
            let Disk { socket, queues, queue_size, .. } = disk;
            qemu.args(["-chardev", &format!("socket,id=disk{number},path={}{reconnect}", socket.display())])
                .args([
                    "-device",
                    &format!(
                        "vhost-user-blk-pci,chardev=disk{number},num-queues={queues},queue-size={queue_size}"
                    ),
                ]);
        }
        qemu.args(&self.arguments);
        let process = Process::spawn(lab, &self.name, qemu)?;
        process.wait_for_socket(&agent, BOOT_LIMIT)?;
        let channel = UnixStream::connect(&agent).context("connecting to the guest's agent")?;
        let agent = Agent::new(channel.try_clone()?, channel);
        Ok(Vm { name: self.name.clone(), process, agent, console, control })
    }

    fn start_cloud_hypervisor(&self, lab: &Lab, image: &Image, program: &Path) -> Result<Vm> {
        let console = lab.log(&format!("{}-console", self.name));
        let mut command = Program::new(program);
        command
            .args(["--cpus", &format!("boot={}", self.cpus)])
            .args(["--memory", &format!("size={}M,shared=on", self.memory_mib)])
            .arg("--kernel")
            .arg(&image.kernel)
            .arg("--initramfs")
            .arg(&image.initramfs)
            .args(["--cmdline", &kernel_arguments("ttyS0", "hvc0")])
            .args(["--serial", &format!("file={}", console.display()), "--console", "tty"]);
        if !self.disks.is_empty() {
            command.arg("--disk");
        }
        for Disk { socket, queues, queue_size, .. } in &self.disks {
            let socket = socket.display();
            command
                .arg(format!("vhost_user=true,socket={socket},num_queues={queues},queue_size={queue_size}"));
        }
        command.args(&self.arguments);
        self.adopt_cloud_hypervisor(lab, command, console)
    }

    /// Starts a cloud-hypervisor without a machine, for one that is restored from a snapshot or comes by migration
    /// ([`Vm::api`]). Only the name of this builder counts: all else comes with the machine.
    ///
    /// # Errors
    /// When this is no machine of cloud-hypervisor, or it does not start.
    pub fn empty_cloud_hypervisor(self, lab: &Lab) -> Result<Vm> {
        let Hypervisor::CloudHypervisor(program) = &self.hypervisor else {
            bail!("expected cloud-hypervisor, found {:?}", self.hypervisor);
        };
        // The console's log is that of the machine that comes, whose serial port writes to the same file as before.
        let console = lab.log(&format!("{}-console", self.name));
        self.adopt_cloud_hypervisor(lab, Program::new(program), console)
    }

    /// Starts cloud-hypervisor with what every machine here needs besides its hardware.
    ///
    /// The guest's console, on which its agent speaks, is the terminal of the hypervisor: it passes on what it reads from its
    /// standard input only if that is a terminal. Its system call filter is off: some builds kill their own migration thread with it.
    fn adopt_cloud_hypervisor(&self, lab: &Lab, mut command: Program, console: PathBuf) -> Result<Vm> {
        let control = lab.path(self.file("api"));
        let log = lab.log(&self.name);
        command.arg("--api-socket").arg(&control).args(["--seccomp", "false"]);
        let (host, guest) = sys::open_terminal().context("making the terminal for the guest's agent")?;
        command.stdin(Stdio::from(guest.try_clone()?)).stdout(Stdio::from(guest)).stderr(File::create(&log)?);
        let process = Process::adopt(&self.name, log, command)?;
        let agent = Agent::new(host.try_clone()?, host);
        process.wait_for_socket(&control, BOOT_LIMIT)?;
        Ok(Vm { name: self.name.clone(), process, agent, console, control })
    }

    fn file(&self, kind: &str) -> String {
        format!("{}.{kind}", self.name)
    }
}

/// A booted virtual machine; killed when dropped.
pub struct Vm {
    name: String,
    process: Process,
    agent: Agent,
    console: PathBuf,
    control: PathBuf,
}

impl Vm {
    /// Runs `script` in the guest's shell and returns its standard output.
    ///
    /// # Errors
    /// When it ends with another status than 0 or takes longer than two minutes, or when the guest dies.
    pub fn run(&self, script: &str) -> Result<String> {
        self.run_within(COMMAND_LIMIT, script)
    }

    /// As [`Vm::run`], with another limit of time.
    ///
    /// # Errors
    /// As [`Vm::run`].
    pub fn run_within(&self, limit: Duration, script: &str) -> Result<String> {
        let command = self.start(script)?;
        self.wait_within(limit, command)?
            .success()
            .with_context(|| format!("in guest '{}': {script}", self.name))
    }

    /// Runs `script` in the guest's shell and returns how it ended, well or not.
    ///
    /// # Errors
    /// When it takes longer than two minutes, or when the guest dies.
    pub fn try_run(&self, script: &str) -> Result<Output> {
        let command = self.start(script)?;
        self.wait_within(COMMAND_LIMIT, command)
    }

    /// Starts `script` in the guest and leaves it running.
    ///
    /// # Errors
    /// When the guest is gone.
    pub fn start(&self, script: &str) -> Result<Command> {
        self.agent.start(script)
    }

    /// Waits for a command started before.
    ///
    /// # Errors
    /// When it takes longer than `limit`, or when the guest dies.
    pub fn wait_within(&self, limit: Duration, command: Command) -> Result<Output> {
        command.wait_while(limit, || self.check_alive())
    }

    /// The device file of the disk with this serial.
    ///
    /// # Errors
    /// When the guest sees no such disk.
    pub fn device(&self, serial: &str) -> Result<String> {
        let script = "for disk in /sys/block/vd*; do echo \"${disk##*/}:$(cat $disk/serial)\"; done";
        let disks = self.run(script)?;
        let found = disks.lines().find_map(|line| line.split_once(':').filter(|(_, known)| *known == serial));
        found
            .map(|(name, _)| format!("/dev/{name}"))
            .with_context(|| format!("the guest has no disk with serial '{serial}'; it has: {disks}"))
    }

    /// Powers the guest off, file systems being unmounted by the test.
    ///
    /// # Errors
    /// When it does not go down in time.
    pub fn shutdown(self) -> Result<()> {
        // Never answered: the agent goes down with the rest.
        self.start("sync; poweroff -f")?;
        self.process.wait_exit(SHUTDOWN_LIMIT).map(|_| ())
    }

    /// Kills the hypervisor with SIGKILL, whatever the guest is doing.
    ///
    /// # Errors
    /// When it does not go.
    pub fn kill(&self) -> Result<()> {
        self.process.kill()
    }

    /// The hypervisor's process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Everything that the guest's kernel and first program have written to the console.
    #[must_use]
    pub fn console(&self) -> String {
        workspace::tail(&self.console, u64::MAX)
    }

    /// QEMU's control connection.
    ///
    /// # Errors
    /// When the hypervisor is not QEMU or does not answer.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.control)
    }

    /// cloud-hypervisor's control interface.
    #[must_use]
    pub fn api(&self) -> VmmApi {
        VmmApi::new(&self.control)
    }

    /// Waits until the guest has booted again, and its agent answers.
    ///
    /// # Errors
    /// When the guest panics, stops or takes too long.
    pub fn wait_for_reboot(&self) -> Result<()> {
        self.agent
            .wait_ready(BOOT_LIMIT, || self.check_alive())
            .with_context(|| self.boot_log_tail())
            .map(|_| ())
    }

    /// The control socket: QMP of QEMU, the HTTP API of cloud-hypervisor.
    #[must_use]
    pub fn control_socket(&self) -> &Path {
        &self.control
    }

    fn check_alive(&self) -> Result<()> {
        if let Some(status) = self.process.exit_status()? {
            bail!(
                "the machine '{}' ended ({status}): {}\n{}",
                self.name,
                self.process.log_text().trim_end(),
                self.boot_log_tail()
            );
        }
        if workspace::tail(&self.console, BOOT_LOG_TAIL).contains("Kernel panic") {
            bail!("the guest '{}' panicked; {}", self.name, self.boot_log_tail());
        }
        Ok(())
    }

    fn boot_log_tail(&self) -> String {
        format!("end of its console:\n{}", workspace::tail(&self.console, BOOT_LOG_TAIL).trim_end())
    }
}

/// The guest's kernel command line. A panic ends the machine at once; mitigations only cost time under emulation. Pages are not
/// zeroed when they are allocated: a processor that has just written them would hide that a device wrote without logging it.
fn kernel_arguments(console: &str, agent: &str) -> String {
    format!(
        "console={console} panic=-1 mitigations=off init_on_alloc=0 random.trust_cpu=on tsc=reliable rmr.agent={agent}"
    )
}

/// Major and minor version of QEMU: Debian 12 has 7.2, its backports 10.
fn qemu_version(program: &Path) -> Result<(u32, u32)> {
    let text = programs::output_of(Program::new(program).arg("--version"))?;
    let version = text.split_whitespace().find(|word| word.starts_with(|first: char| first.is_ascii_digit()));
    let mut numbers = version.unwrap_or_default().split('.').map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => bail!(
            "expected 'QEMU emulator version N.N…' from {}, found '{}'",
            program.display(),
            text.trim_end()
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Stands in for cloud-hypervisor: says what it was started with, and answers commands with their length, if its standard
    /// input and output are a terminal.
    const FAKE: &str = r#"#!/bin/sh
echo "$@" >&2
while [ $# -gt 0 ]; do
    [ "$1" = --api-socket ] && api=$2
    shift
done
[ -t 0 ] && [ -t 1 ] || { echo "not a terminal" >&2; exit 9; }
perl -MIO::Socket::UNIX -e 'IO::Socket::UNIX->new(Local => $ARGV[0], Listen => 1) or die' "$api"
printf '{"ready":"fake"}\n'
while read -r id script; do
    [ "$script" = ZW5k ] && exit 0
    printf '{"id":%s,"exit":0,"stdout":"%s","stderr":""}\n' "$id" "$(printf %s "${#script}" | base64)"
done
"#;

    #[test]
    fn the_agent_on_cloud_hypervisor_speaks_over_a_terminal_that_changes_nothing() -> Result<()> {
        workspace::run("fake cloud-hypervisor", |lab| {
            let program = lab.path("fake");
            std::fs::write(&program, FAKE)?;
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700))?;
            let image = Image { kernel: "/kernel".into(), initramfs: "/initramfs".into() };
            let hypervisor = Hypervisor::CloudHypervisor(program);
            let disk = Disk::vhost_user("/disk").queues(2).queue_size(512);
            let vm = VmBuilder::new("guest").hypervisor(hypervisor).image(image).disk(disk).boot(lab)?;
            // Beyond the 4095 bytes of a line that a terminal edits. Base64 is four characters for three.
            for length in [3, 3000, 30_000] {
                assert_eq!(vm.run(&"x".repeat(length))?, (length * 4 / 3).to_string());
            }
            let started = vm.process().log_text();
            for words in ["--seccomp false", "--console tty", "socket=/disk,num_queues=2,queue_size=512"] {
                assert!(started.contains(words), "{words} is missing: {started}");
            }
            let last = vm.start("end")?;
            let error = vm.wait_within(BOOT_LIMIT, last).expect_err("it ended").to_string();
            assert!(error.contains("exit status: 0"), "{error}");
            Ok(())
        })
    }
}
