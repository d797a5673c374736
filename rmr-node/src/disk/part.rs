//! A part of a buffer that was lent out: its user gives it back by dropping it, and whoever lent it reads in a list which
//! parts came back.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

use rmr_common::buffer::Segment;

use super::Buffer;

/// Marks of parts that came back.
pub type Returned = Rc<RefCell<Vec<u32>>>;

/// See the module's comment.
pub struct Part {
    memory: Rc<Buffer>,
    offset: usize,
    length: usize,
    /// Who is told, and by which mark.
    told: Option<(u32, Returned)>,
}

impl Part {
    /// `length` bytes from `offset` of a buffer, if it has them. `mark` comes into `returned` when the part is dropped.
    #[must_use]
    pub fn new(
        memory: &Rc<Buffer>,
        offset: usize,
        length: usize,
        mark: u32,
        returned: &Returned,
    ) -> Option<Self> {
        let mut part = Self::of(memory, offset, length)?;
        part.told = Some((mark, Rc::clone(returned)));
        Some(part)
    }

    /// `length` bytes from `offset` of a buffer, if it has them; nobody is told when they come back.
    #[must_use]
    pub fn of(memory: &Rc<Buffer>, offset: usize, length: usize) -> Option<Self> {
        let fits = offset.checked_add(length).is_some_and(|end| end <= memory.length());
        fits.then(|| Self { memory: Rc::clone(memory), offset, length, told: None })
    }

    /// The part as a segment, under the rule of [`Buffer::segment`].
    #[must_use]
    pub fn segment(&self) -> Segment {
        self.memory.segment().part(self.offset, self.length)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some((mark, returned)) = &self.told {
            returned.borrow_mut().push(*mark);
        }
    }
}

impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Part({} bytes at {} of {:?})", self.length, self.offset, self.memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::BufferPool;

    #[test]
    fn a_part_lies_within_its_buffer_keeps_it_and_tells_when_it_comes_back() {
        let pool = BufferPool::new(1 << 20).unwrap();
        let memory = Rc::new(pool.try_acquire(65536).unwrap());
        let returned = Returned::default();
        assert!(Part::new(&memory, 61440, 4097, 1, &returned).is_none());
        assert!(Part::new(&memory, usize::MAX, 2, 1, &returned).is_none());
        let part = Part::new(&memory, 61440, 4096, 7, &returned).unwrap();
        assert_eq!(part.segment().base() as usize - memory.segment().base() as usize, 61440);
        assert_eq!(part.segment().length(), 4096);
        drop(memory);
        assert_eq!(pool.free_bytes(), pool.total_bytes() - 65536);
        assert!(returned.borrow().is_empty());
        drop(part);
        assert_eq!(*returned.borrow(), [7]);
        assert_eq!(pool.free_bytes(), pool.total_bytes());
    }
}
