//! Several named checks that share one costly topology: all of them run, and all that failed are reported together.

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
        assert!(!checks.check("ice is hot", || bail!("it is cold")));
        let report = checks.finish().unwrap_err().to_string();
        assert!(report.contains("1 checks held, 2 did not"), "{report}");
        assert!(
            report.contains("water is dry: it is wet") && report.contains("ice is hot: it is cold"),
            "{report}"
        );
        assert!(Checks::new().finish().is_err());
    }
}
