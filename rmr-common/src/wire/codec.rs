//! How fields stand in the body of a control message: an encoder that appends them, and a decoder that checks each against
//! the end of the body and against what it may be.

use super::{Kind, MAX_BODY, MAX_TEXT, WireError};
use crate::pool::{
    Address, Attested, ChunkSize, Epoch, MAX_MEMBERS, MAX_NUMBER, Mark, MemberId, MemberSet, MemberSpec,
    MemberState, MemberView, PoolId, PoolSpec, Position, StoreId, View, ViewNumber,
};

/// Appends little-endian fields to a body.
#[derive(Default, Debug)]
pub struct Encoder(Vec<u8>);

impl Encoder {
    /// The bytes so far.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        debug_assert!(self.0.len() <= MAX_BODY as usize, "{} bytes", self.0.len());
        self.0
    }

    /// Appends one byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    /// Appends two bytes.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Appends four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Appends eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Appends 16 bytes as they are.
    pub fn uuid(&mut self, value: &[u8; 16]) -> &mut Self {
        self.0.extend_from_slice(value);
        self
    }

    /// Appends bytes as they are.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Appends a two-byte length and UTF-8 text, cut at [`MAX_TEXT`] bytes.
    pub fn text(&mut self, value: &str) -> &mut Self {
        let mut end = value.len().min(MAX_TEXT);
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        self.u16(u16::try_from(end).unwrap_or(0));
        self.0.extend_from_slice(&value.as_bytes()[..end]);
        self
    }

    /// Appends a pool specification.
    pub fn spec(&mut self, spec: &PoolSpec) -> &mut Self {
        self.uuid(spec.id.as_bytes()).u64(spec.size);
        self.u8(u8::try_from(spec.chunk_size.shift()).unwrap_or(0))
            .u32(spec.logical_block_size)
            .text(&spec.name);
        self.u8(u8::try_from(spec.members.len()).unwrap_or(u8::MAX));
        for member in &spec.members {
            self.u8(member.id.as_u8()).u8(member.maintenance.into()).uuid(member.store.as_bytes());
            self.text(&member.address.to_string());
        }
        self
    }

    /// Appends a position.
    pub fn position(&mut self, position: &Position) -> &mut Self {
        self.u64(position.epoch.0).u64(position.view_epoch.0).u64(position.view.0).u64(position.mark.0)
    }

    /// Appends what is remembered of the members of a pool, those of which nothing is left out.
    pub fn attested(&mut self, attested: &Attested) -> &mut Self {
        let known = || MemberId::all().filter(|m| *attested.of(*m) != Position::default());
        self.u8(attested.regressed.0).u8(known().collect::<MemberSet>().0);
        for member in known() {
            self.position(attested.of(member));
        }
        self
    }

    /// Appends a view.
    pub fn view(&mut self, view: &View) -> &mut Self {
        self.u64(view.number.0).u64(view.epoch.0);
        self.u8(u8::try_from(view.members.len()).unwrap_or(u8::MAX));
        for member in &view.members {
            self.u8(member.id.as_u8()).u8(member.state as u8).uuid(member.store.as_bytes());
        }
        self
    }
}

/// Takes little-endian fields from a body; every method fails rather than read past the end.
#[derive(Debug)]
pub struct Decoder<'a> {
    kind: Kind,
    whole: usize,
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// Reads the body of a message of `kind`, which errors name.
    #[must_use]
    pub const fn new(kind: Kind, body: &'a [u8]) -> Self {
        Self { kind, whole: body.len(), rest: body }
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or_else(|| self.length_error())?;
        self.rest = rest;
        Ok(*head)
    }

    fn length_error(&self) -> WireError {
        WireError::BodyLength { kind: self.kind, found: self.whole }
    }

    pub(super) fn value_error(&self, reason: impl ToString) -> WireError {
        WireError::BodyValue { kind: self.kind, reason: reason.to_string() }
    }

    /// Takes one byte.
    ///
    /// # Errors
    /// [`WireError::BodyLength`] at the end of the body; so for all methods.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    /// Takes two bytes.
    ///
    /// # Errors
    /// At the end of the body.
    pub fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// Takes four bytes.
    ///
    /// # Errors
    /// At the end of the body.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Takes eight bytes.
    ///
    /// # Errors
    /// At the end of the body.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Takes 16 bytes.
    ///
    /// # Errors
    /// At the end of the body.
    pub fn uuid(&mut self) -> Result<[u8; 16], WireError> {
        self.array()
    }

    /// Takes a text.
    ///
    /// # Errors
    /// At the end of the body, or when the text is too long or not UTF-8.
    pub fn text(&mut self) -> Result<String, WireError> {
        let length = usize::from(self.u16()?);
        if length > MAX_TEXT {
            return Err(self.value_error(format!("a text of {length} bytes, expected at most {MAX_TEXT}")));
        }
        let (head, rest) = self.rest.split_at_checked(length).ok_or_else(|| self.length_error())?;
        self.rest = rest;
        String::from_utf8(head.to_vec()).map_err(|_| self.value_error("a text that is not UTF-8"))
    }

    /// Takes a member id.
    ///
    /// # Errors
    /// At the end of the body, or when it is not below 8.
    pub fn member(&mut self) -> Result<MemberId, WireError> {
        let index = self.u8()?;
        MemberId::try_from(index).map_err(|reason| self.value_error(reason))
    }

    /// Takes an epoch, a view number or a sequence.
    ///
    /// # Errors
    /// At the end of the body, or when it is above [`MAX_NUMBER`].
    pub fn number(&mut self) -> Result<u64, WireError> {
        let number = self.u64()?;
        if number > MAX_NUMBER {
            let text = format!("an epoch, view or sequence of {number}, expected at most {MAX_NUMBER}");
            return Err(self.value_error(text));
        }
        Ok(number)
    }

    /// Takes a pool specification and validates it.
    ///
    /// # Errors
    /// At the end of the body, or when the specification breaks a rule.
    pub fn spec(&mut self) -> Result<PoolSpec, WireError> {
        let id = PoolId::from_bytes(self.uuid()?);
        let size = self.u64()?;
        let shift = self.u8()?;
        let bytes = 1u64.checked_shl(shift.into()).unwrap_or(0);
        let chunk_size = ChunkSize::from_bytes(bytes).map_err(|e| self.value_error(e))?;
        let logical_block_size = self.u32()?;
        let name = self.text()?;
        let count = self.u8()?;
        let mut members = Vec::with_capacity(usize::from(count).min(MAX_MEMBERS));
        for _ in 0..count {
            let id = self.member()?;
            let maintenance = self.u8()? != 0;
            let store = StoreId::from_bytes(self.uuid()?);
            let address: Address = self.text()?.parse().map_err(|e| self.value_error(e))?;
            members.push(MemberSpec { id, store, address, maintenance });
        }
        let spec = PoolSpec { id, name, size, chunk_size, logical_block_size, members };
        spec.validate().map_err(|e| self.value_error(e))?;
        Ok(spec)
    }

    /// Takes a view and validates it.
    ///
    /// # Errors
    /// At the end of the body, or when the view breaks a rule.
    pub fn view(&mut self) -> Result<View, WireError> {
        let number = ViewNumber(self.number()?);
        let epoch = Epoch(self.number()?);
        let count = self.u8()?;
        let mut members = Vec::with_capacity(usize::from(count).min(MAX_MEMBERS));
        for _ in 0..count {
            let id = self.member()?;
            let code = self.u8()?;
            let state = MemberState::from_code(code)
                .ok_or_else(|| WireError::UnknownCode { what: "member state", found: code.into() })?;
            members.push(MemberView { id, store: StoreId::from_bytes(self.uuid()?), state });
        }
        let view = View { number, epoch, members };
        view.validate().map_err(|e| self.value_error(e))?;
        Ok(view)
    }

    /// Takes a position.
    ///
    /// # Errors
    /// At the end of the body, or when a number is above [`MAX_NUMBER`].
    pub fn position(&mut self) -> Result<Position, WireError> {
        Ok(Position {
            epoch: Epoch(self.number()?),
            view_epoch: Epoch(self.number()?),
            view: ViewNumber(self.number()?),
            mark: Mark(self.number()?),
        })
    }

    /// Takes what is remembered of the members of a pool.
    ///
    /// # Errors
    /// At the end of the body, or when a number is above [`MAX_NUMBER`].
    pub fn attested(&mut self) -> Result<Attested, WireError> {
        let mut attested = Attested::default();
        attested.regressed = MemberSet(self.u8()?);
        for member in MemberSet(self.u8()?).iter() {
            let position = self.position()?;
            if position == Position::default() {
                return Err(self.value_error(format!("member {member} is listed with an empty position")));
            }
            attested.note(member, &position);
        }
        Ok(attested)
    }

    /// Takes a view and the specification that goes with it.
    ///
    /// # Errors
    /// At the end of the body, or when one breaks a rule or they do not go together.
    pub fn pool(&mut self) -> Result<(View, PoolSpec), WireError> {
        let (view, spec) = (self.view()?, self.spec()?);
        if spec.describes(&view) {
            Ok((view, spec))
        } else {
            Err(self.value_error("a view with other members or stores than the specification"))
        }
    }

    /// Ends the body.
    ///
    /// # Errors
    /// When bytes are left over.
    pub fn finish(self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.length_error()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_at_a_character_boundary() {
        let mut e = Encoder::default();
        e.text(&"ä".repeat(MAX_TEXT));
        let bytes = e.finish();
        let text = Decoder::new(Kind::Hello, &bytes).text().unwrap();
        assert_eq!(text, "ä".repeat(MAX_TEXT / 2));
    }
}
