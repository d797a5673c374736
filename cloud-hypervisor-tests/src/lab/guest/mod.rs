//! What runs inside a lab's virtual machine: Debian's kernel, an initramfs made for the test, and the agent that executes
//! the host's commands and reports exit status and output. [`super::vm`] is the machine around it.

mod agent;
mod cpio;
mod image;
mod kernel;

pub(super) use agent::Agent;
pub use agent::{Command, Output};
pub use image::{Image, ImageBuilder};
