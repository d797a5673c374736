//! Several named checks that share one costly topology: all of them run, and all that failed are reported together.

use std::io::Write;
use std::time::Instant;

use anyhow::{Result, bail};

/// The list of checks of one test. Dropping it without [`Checks::finish`] while it holds failures would lose them.
#[derive(Debug, Default)]
#[must_use = "failures are reported by finish()"]
pub struct Checks {
    passed: usize,
    failures: Vec<String>,
}

impl Checks {
    /// No checks yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs one check, named as a sentence. Returns whether it held, for checks that build on it.
    pub fn check(&mut self, sentence: &str, check: impl FnOnce() -> Result<()>) -> bool {
        let started = Instant::now();
        let result = check();
        let seconds = started.elapsed().as_secs_f64();
        match &result {
            Ok(()) => {
                self.passed += 1;
                eprintln!("  ok      {sentence} ({seconds:.1} s)");
            }
            Err(error) => {
                eprintln!("  FAILED  {sentence} ({seconds:.1} s): {error:#}");
                self.failures.push(format!("{sentence}: {error:#}"));
            }
        }
        result.is_ok()
    }

    /// Says loudly that a check cannot be made here, and why. It counts neither as held nor as failed.
    pub fn not_run(&mut self, sentence: &str, why: &str) {
        // Not by eprintln!, whose output is hidden for tests that pass.
        let _ = writeln!(std::io::stderr(), "\nNOT RUN (skipped): {sentence}: {why}");
    }

    /// Reports the failures, if any.
    ///
    /// # Errors
    /// When a check failed, or when none was made.
    pub fn finish(self) -> Result<()> {
        if !self.failures.is_empty() {
            bail!(
                "{} checks held, {} did not:\n- {}",
                self.passed,
                self.failures.len(),
                self.failures.join("\n- ")
            );
        }
        if self.passed == 0 {
            bail!("no check was made");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failed_check_is_reported_and_later_ones_still_run() {
        let mut checks = Checks::new();
        assert!(!checks.check("water is dry", || bail!("it is wet")));
        assert!(checks.check("one is one", || Ok(())));
        checks.not_run("fire is warm", "there is no fire");
        assert!(!checks.check("ice is hot", || bail!("it is cold")));
        let report = checks.finish().unwrap_err().to_string();
        assert!(report.contains("1 checks held, 2 did not"), "{report}");
        assert!(
            report.contains("water is dry: it is wet") && report.contains("ice is hot: it is cold"),
            "{report}"
        );
        let mut none = Checks::new();
        none.not_run("fire is warm", "there is no fire");
        assert!(none.finish().is_err());
    }
}
