//! Memory that its owner has taken away: the message is completed without it, and the connection stays.

use super::*;
use crate::pool::Sequence;

const PAGES: usize = 64;
const LENGTH: usize = PAGES * PAGE;

/// Memory of which some pages cannot be reached.
struct Holes {
    base: *mut u8,
}

impl Holes {
    fn new(bytes: &[u8], holes: &[usize]) -> Self {
        // SAFETY: a new mapping touches no memory that Rust knows of, and is written to within its length.
        unsafe {
            let (access, kind) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let base = libc::mmap(std::ptr::null_mut(), LENGTH, access, kind, -1, 0);
            assert_ne!(base, libc::MAP_FAILED);
            let base: *mut u8 = base.cast();
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), base, bytes.len());
            for hole in holes {
                assert_eq!(libc::mprotect(base.add(hole * PAGE).cast(), PAGE, libc::PROT_NONE), 0);
            }
            Self { base }
        }
    }

    fn segment(&self) -> Segment {
        // SAFETY: the kernel finds out which pages can be reached; the tests read no others.
        unsafe { Segment::new(self.base, LENGTH) }
    }

    fn page(&self, page: usize) -> Vec<u8> {
        let mut bytes = vec![0; PAGE];
        self.segment().part(page * PAGE, PAGE).copy_to(&mut bytes);
        bytes
    }
}

impl Drop for Holes {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and no connection uses it any more.
        unsafe { libc::munmap(self.base.cast(), LENGTH) };
    }
}

/// Memory with these bytes, of which one page cannot be reached; it is never given back.
pub(crate) fn torn_pages(bytes: &[u8], hole: usize) -> Segment {
    let memory = Holes::new(bytes, &[hole]);
    let segment = memory.segment().part(0, bytes.len());
    std::mem::forget(memory);
    segment
}

/// A sink with such memory for the data of slot 1.
struct Target<'a> {
    memory: &'a Holes,
    sink: Sink,
    faulted: Vec<Slot>,
    tolerates: bool,
}

impl Receiver for Target<'_> {
    fn place(&mut self, header: &MessageHeader, segments: &mut Vec<Segment>) -> Place {
        if header.slot != Slot(1) {
            return self.sink.place(header, segments);
        }
        segments.extend([self.memory.segment().part(0, 10_000), self.memory.segment().part(10_000, LENGTH)]);
        Place::Data
    }

    fn deliver(&mut self, header: &MessageHeader, body: &[u8]) {
        self.sink.deliver(header, body);
    }

    fn deliver_faulted(&mut self, header: &MessageHeader) -> bool {
        self.faulted.push(header.slot);
        self.tolerates
    }
}

fn request(slot: u16) -> MessageHeader {
    MessageHeader {
        sequence: Sequence(u64::from(slot) + 100),
        ..write_header(slot, u32::try_from(LENGTH).unwrap())
    }
}

fn cases() -> [Vec<usize>; 5] {
    [vec![3], vec![0], vec![PAGES - 1], vec![7, 8, 20], (0..PAGES).collect()]
}

#[test]
fn a_write_whose_memory_is_gone_is_completed_with_filler_and_named_and_the_others_are_whole() {
    let bytes = pattern(5, LENGTH);
    for holes in cases() {
        let (mut a, mut b) = pair();
        let (whole, torn) = (Holes::new(&bytes, &[]), Holes::new(&bytes, &holes));
        a.queue(&MessageHeader { kind: Kind::Hello, length: 0, payload: 2, ..request(9) }, Some(vec![1, 2]));
        for (slot, memory) in [(0, &whole), (1, &torn), (2, &whole)] {
            a.queue_data(&request(slot), None, &mut |list| {
                // At no page's border.
                list.extend([memory.segment().part(0, 5000), memory.segment().part(5000, LENGTH)]);
            });
        }
        let mut sink = Sink::default();
        pump(&mut a, &mut b, &mut sink, 4);
        assert!(sink.buffers[0] == bytes && sink.buffers[2] == bytes, "{holes:?}");
        for (page, got) in sink.buffers[1].chunks(PAGE).enumerate() {
            let expected = if holes.contains(&page) { &[0; PAGE][..] } else { &bytes[page * PAGE..][..PAGE] };
            assert!(got == expected, "page {page} of {holes:?}");
        }
        let mut faults = Vec::new();
        a.take_faults(&mut faults);
        assert_eq!(faults, [(Slot(1), Sequence(101))], "{holes:?}");
        assert!(!a.wants_to_send());
        // And the connection goes on as before.
        a.queue_data(&request(3), None, &mut |list| list.push(whole.segment()));
        pump(&mut a, &mut b, &mut sink, 5);
        a.take_faults(&mut faults);
        assert!(sink.buffers[3] == bytes && faults.len() == 1);
    }
}

#[test]
fn data_that_is_no_write_is_never_made_up() {
    let (mut a, _b) = pair();
    let torn = Holes::new(&[], &[1]);
    let answer = request(1).reply(Kind::IoReply, Status::Ok);
    let answer = MessageHeader { payload: u32::try_from(LENGTH).unwrap(), ..answer };
    a.queue_data(&answer, None, &mut |list| list.push(torn.segment()));
    let deadline = Instant::now() + PATIENCE;
    while a.flush().is_ok() {
        assert!(Instant::now() < deadline, "sent what could not be read");
    }
}

#[test]
fn data_for_memory_that_is_gone_goes_nowhere_and_the_next_message_is_whole() {
    let bytes = pattern(6, LENGTH);
    for holes in cases() {
        let (mut a, mut b) = pair();
        let torn = Holes::new(&[], &holes);
        // SAFETY: `bytes` outlives the connection's use of it.
        let data = unsafe { Segment::new(bytes.as_ptr().cast_mut(), LENGTH) };
        (0..3).for_each(|slot| a.queue_data(&request(slot), None, &mut |list| list.push(data)));
        let mut target =
            Target { memory: &torn, sink: Sink::default(), faulted: Vec::new(), tolerates: true };
        let deadline = Instant::now() + PATIENCE;
        while target.sink.messages.len() < 2 {
            assert!(Instant::now() < deadline, "{holes:?}: messages are missing");
            a.flush().unwrap();
            b.receive(&mut target).unwrap();
        }
        assert_eq!(target.faulted, [Slot(1)], "{holes:?}");
        assert!(target.sink.buffers.iter().all(|got| *got == bytes), "{holes:?}");
        for page in (0..PAGES).filter(|page| !holes.contains(page)) {
            assert!(torn.page(page) == bytes[page * PAGE..][..PAGE], "page {page} of {holes:?}");
        }
    }
}

#[test]
fn a_receiver_that_has_no_answer_to_a_fault_loses_the_connection() {
    let bytes = pattern(7, LENGTH);
    let (mut a, mut b) = pair();
    let torn = Holes::new(&[], &[1]);
    // SAFETY: as above.
    let data = unsafe { Segment::new(bytes.as_ptr().cast_mut(), LENGTH) };
    a.queue_data(&request(1), None, &mut |list| list.push(data));
    let mut target = Target { memory: &torn, sink: Sink::default(), faulted: Vec::new(), tolerates: false };
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "the connection stays");
        a.flush().unwrap();
        if b.receive(&mut target).is_err() {
            break;
        }
    }
}

#[test]
fn what_can_be_read_of_torn_memory_is_salvaged_and_the_rest_is_zeroes() {
    let bytes = pattern(8, LENGTH);
    let torn = Holes::new(&bytes, &[2, 5]);
    let mut copy = vec![7];
    let list = [torn.segment().part(0, 100), torn.segment().part(100, LENGTH)];
    crate::buffer::salvage(&list, 50, 7 * PAGE, &mut copy);
    let mut expected = bytes;
    expected[2 * PAGE..3 * PAGE].fill(0);
    expected[5 * PAGE..6 * PAGE].fill(0);
    assert!(copy[0] == 7 && copy[1..] == expected[50..50 + 7 * PAGE]);
}
