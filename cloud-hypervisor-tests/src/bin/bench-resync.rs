//! Q
use cloud_hypervisor_tests::{bench::resync::quick, lab};
fn main() -> anyhow::Result<()> {
    let a: Vec<u64> = std::env::args().skip(1).map(|x| x.parse().unwrap()).collect();
    lab::run("resync", |lab| {
        let run = quick(lab, a[0], a[1], u32::try_from(a[2]).unwrap())?;
        println!("{run:#?}");
        Ok(())
    })
}
