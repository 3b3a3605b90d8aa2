"""Generate the pretraining text of the tiny base models: a customer's message and an agent's reply.

Every phrase below was written for this project. In a phrase, `[a|b]` stands for one of the
alternatives, and `{slot}` stands for one entry of SLOTS.

The agent apologises for faults, answers questions and is glad about praise. To predict the reply,
a model must therefore recognise which kind of message it reads. The text never names these kinds.
"""

import random
import re


def lines(text):
    return text.strip().splitlines()


SLOTS = {
    "n": "two|three|four|five|six|seven|eight|nine|ten|twelve|2|3|4|5|6|8|10|12",
    "big": "20|25|30|35|40|45|50|60|70|80|90|100|120|150|200|twenty|thirty|forty|fifty|ninety",
    "nth": "second|third|fourth|fifth|2nd|3rd|tenth",
    "unit": "days|weeks|hours|months",
    "day": "monday|tuesday|wednesday|thursday|friday|saturday|sunday",
    "when": "today|yesterday|this morning|last night|tonight|this week|last week|on {day}"
    "|this afternoon|this evening|last month",
    "soon": "tomorrow|tonight|next week|on {day}|this weekend|next month|this summer"
    "|over christmas|in the morning",
    "clock": "six|seven|eight|nine|ten|noon|5pm|7pm|8am|9am|half past six|midnight|10:30|7:45",
    "money": "£5|£12|£20|£35|£60|£80|£150|$9|$15|$40|$75|$200|€8|€30|€99|ten pounds|fifty quid"
    "|twenty dollars",
    "who": "my mum|my dad|my wife|my husband|my son|my daughter|my sister|my brother|my nan"
    "|my neighbour|my friend|my boss|the kids|my parents|my partner|my flatmate|my aunt|my grandma"
    "|my colleague|we|i|my cousin",
    "person": "mum|dad|my wife|my husband|my son|my daughter|my sister|my brother|gran|my friend"
    "|my neighbour|the kids",
    "name": "Anna|Ben|Carla|Dev|Ella|Femi|Grace|Hugo|Iris|Jonas|Kim|Leo|Maya|Nora|Omar|Priya|Rosa"
    "|Sam|Tom|Vera|Will|Zoe|Lucy",
    "place": "Leeds|York|Bath|Rome|Paris|Oslo|Berlin|Madrid|Dublin|Bristol|Boston|Denver|Lisbon"
    "|Vienna|Cardiff|Glasgow|Porto|Milan|Athens|Austin|Chicago|Seattle|Prague|the coast"
    "|the airport|town|the city|the village|London|Spain|Italy",
    "colour": "blue|red|green|black|white|grey|yellow|pink|brown|navy|purple|orange",
    "size": "small|medium|large|size 8|size 12|a ten|extra large|bigger|smaller|size 40",
    "staff": "the driver|the guy at the desk|the woman on the phone|your team|the manager"
    "|the waiter|the engineer|the agent|the assistant|the crew|the technician"
    "|the man at the counter|your staff|the lady at the till|the courier|support|the receptionist",
    "team": "your team|the team|the staff|your driver|the engineer|{name} in store"
    "|{name} at the desk|{name} on chat|{name}|the lady on the phone|your support team|the crew"
    "|the young man at the till|the guy who helped me|everyone at the branch",
    "channel": "email|phone|chat|twitter|dm|the app|the website|letter|the help line",
    "room": "kitchen|bathroom|bedroom|living room|hall|garden|office|garage|loft|nursery",
    "bad": "awful|terrible|poor|rubbish|dreadful|useless|horrible|shocking|disgusting|a joke"
    "|ridiculous|a mess|unacceptable|appalling|a disgrace|pathetic|the worst|not good enough"
    "|really bad|so frustrating|a shambles|hopeless|disappointing",
    "good": "great|lovely|brilliant|amazing|fantastic|perfect|excellent|wonderful|so good|superb"
    "|spot on|really nice|awesome|a joy|the best|very good|beautiful|outstanding|first class"
    "|so easy|impressive|delightful|fab",
    "mad": "angry|annoyed|upset|fed up|furious|frustrated|disappointed|let down|gutted|cross|livid"
    "|unhappy|sick of this|disgusted",
    "glad": "happy|pleased|delighted|impressed|thrilled|grateful|over the moon|so chuffed|excited"
    "|very happy|thankful",
    "thing": "parcel|order|phone|charger|screen|router|card|account|ticket|seat|room|bed|shower"
    "|meal|pizza|coffee|burger|app|website|update|bill|meter|heating|boiler|shirt|dress|jacket"
    "|shoes|jeans|treadmill|class|locker|car|taxi|bike|laptop|keyboard|headphones|tv|remote|game"
    "|console|sofa|table|chair|mattress|kettle|toaster|fridge|oven|dishwasher|washing machine"
    "|printer|camera|watch|bag|suitcase|coat|boots|trainers|sandwich|salad|milk|bread|fruit|cake"
    "|soup|fish|chicken|battery|speaker|tablet|cable|lamp|curtain|carpet|pram|toy|book|magazine"
    "|flowers|bouquet|gift card|voucher|refund|lift|pool|door|window|bus|train|flight|ferry|tram"
    "|parking|service|delivery|customer service|signal|connection|broadband|wifi|password|desk"
    "|hoover|blender|microwave|freezer|razor|perfume|cream|shampoo|glasses|ring|necklace|tent"
    "|sleeping bag|helmet|scooter",
    "fail": "is broken|is faulty|does not work|doesn't work|stopped working|won't turn on"
    "|keeps breaking|fell apart|is damaged|never turned up|never came|has gone missing"
    "|is late again|is still not fixed|was cancelled|smells|leaks|is cracked|is dirty|was cold"
    "|was wrong|is a mess|is useless|is rubbish|is awful|was terrible|broke after {n} {unit}"
    "|is not what i ordered|is missing parts|is out of order|keeps failing|keeps crashing"
    "|was ruined|arrived damaged|is falling to bits|is way too slow|is getting worse|was stale"
    "|was late|is dead|died after {n} {unit}|had a hole in it|was filthy|makes a horrible noise"
    "|is nothing like the picture|has been down since {day}|is stuck|will not load|won't open"
    "|won't charge|overheats|was half empty",
    "fine": "is great|is lovely|works perfectly|works really well|is so good|is brilliant"
    "|looks amazing|arrived early|came on time|is perfect|is so comfy|was delicious|was spotless"
    "|is very quick|is easy to use|is worth every penny|fits perfectly|made my day"
    "|is the best i have had|is better than i hoped|is fab|was super quick"
    "|looks even better in real life|is excellent|was hot and tasty|was clean and quiet"
    "|is running smoothly|is back and better than ever|was such good value|turned up today",
    "emoji_bad": "😡|😠|🤬|😤|😞|😩|🙄|😒|👎|😭|🤦|😣",
    "emoji_good": "😊|😍|👍|🙌|❤️|🎉|😀|👏|🥰|🙏|✨|😁|💙",
    "emoji": "🙂|😂|☕|🤔|👋|🌞|🎶|🐶|🍕|🚲|🌧️|😅|😊|🎄",
    "tag_bad": "#fail|#badservice|#notimpressed|#angry|#neveragain|#disappointed|#latetrain"
    "|#rubbish|#fedup|#joke|#poor",
    "tag_good": "#happy|#thankyou|#goodservice|#impressed|#love|#topmarks|#recommended|#kind|#win"
    "|#happycustomer",
    "tag": "#weekend|#travel|#monday|#coffee|#news|#home|#summer|#question|#help|#family|#dogs"
    "|#football|#shopping|#friday",
    "brand_a": "Swift|Blue|North|River|Sunny|Quick|Green|Bright|Nova|Metro|Urban|Cloud|Happy|Royal"
    "|Pixel|Volt|Maple|Penny|Harbor|Oak|Star|Luna|Zip|Fresh|Silver|Alpine|Coral|Fox|Echo|Terra"
    "|Polar|Amber",
    "brand_b": "Post|Mobile|Net|Bank|Rail|Air|Stay|Bites|Soft|Power|Wear|Gym|Mart|Cabs|TV|Care"
    "|Home|Tickets|Parcel|Telecom|Energy|Foods|Jet|Lines|Fit|Pay|Shop|Play|Inn|Box|Books|Water",
}

# topic -> (faults, questions, praise, news, the words that an agent uses for the topic)
TOPICS = {
    "parcels": (
        """
my {parcel} is {n} {unit} late [and nobody can tell me where it is|and no one answers|]
the {parcel} was left [in the rain|in the bin|on the street|outside in full view|\
behind the wheelie bin] again
[still|i am still] waiting for a {parcel} that should have come {when}
{staff} says [it was delivered|he tried to deliver|nobody was home] but [i was in all day|\
nothing came|there was no knock]
your tracking has said out for delivery [for {n} days|since {day}|all week]
the box was [crushed|torn|soaked|open|empty|smashed] when it [arrived|came|got here]
the courier threw my {parcel} over the [fence|gate|wall]
[i paid|paid {money}] for next day delivery and [nothing came|it took {n} days|\
it is still in the depot]
half of my {parcel} is missing [and nobody cares|and you want photos again|]
you delivered my {parcel} to the wrong [house|street|address|flat] and [will not fetch it|\
now it is gone]
[no card|no note|no call|no text], just a {parcel} sent back [to the depot|to the sender] [again|\
for no reason]
stayed home all day for a {parcel} that never [came|showed up|arrived]
the vase came in {n} pieces because nobody bothered to [pack|wrap] it
missed delivery slot again, a whole day [off work|of holiday] wasted
where is my {parcel}? it was due {when} [and i have heard nothing|]
you lost my {parcel} and now you [refuse to pay|blame the sender|ignore my emails]
my {parcel} has been stuck in customs for {n} weeks and nobody [helps|will explain why]
""",
        """
[can i|is it possible to|how do i] change the [delivery address|delivery day|time slot] \
[for my {parcel}|]
do you deliver [on {day}|to {place}|to lockers|on bank holidays]
how much [is it|does it cost] to send a {parcel} to {place}
what time does the [depot|post office|parcel shop] [open|close] [on {day}|]
can [{who}|my neighbour] pick up my {parcel} for me
what is the [last posting date|latest date] for [christmas|{place}]
how big can a {parcel} be for [your lockers|the small rate]
do i need to print a label [or can you bring one|for a return|]
where is the nearest [drop off point|parcel shop|post box]
what [id|papers] do i need to collect a {parcel}
can you leave it with [my neighbour|the concierge|{name} at number {n}] [please|if i am out]
""",
        """
my {parcel} came [a day early|within a day|before breakfast], [thank you|brilliant|great work]
[thanks to|big thanks to] the driver who [carried it upstairs|waited for me|\
hid my {parcel} from the rain|was so kind]
the courier was so [friendly|polite|careful|helpful] [today|as always]
[loved|love] the live map, i knew to the minute when my {parcel} would be here
well packed, fast and cheap, will [use you|send with you] again
the new lockers are [so handy|great], picked up my {parcel} at {clock}
everything arrived [in one piece|safe and sound], even the glasses
""",
        """
just posted a {parcel} to [{person}|{place}|{name}]
waiting for [the postman|a new book|my new {thing}] with a cup of tea
sending [cookies|letters|a birthday card|presents] to {person} {soon}
my {parcel} will be here {soon} according to the tracking
the dog always [barks at|wants to greet] the postman
packing boxes for the [move|christmas post|market]
picked up a {parcel} for [my neighbour|{person}] {when}
""",
        "parcel|delivery|order|package|shipment|tracking number|courier",
    ),
    "phones": (
        """
my {phone} [keeps freezing|keeps switching off|died|overheats|won't charge|won't turn on] \
[after the update|after {n} {unit}|]
the screen [cracked|went black|flickers|has lines on it] after {n} {unit} [and you won't repair it|]
no signal [at home|in {place}|all day|since {day}] [again|and nobody knows why|]
i was charged {money} for [roaming|data|calls] i never [used|made|agreed to]
you put my [contract|bill|plan] up by {money} without [asking|telling me|any warning]
the battery [lasts an hour|is dead by noon|drains in no time|swells up]
{n} {unit} without a working {phone} and you just say wait
the shop sold me a used {phone} as new
my number was cut off [for no reason|by mistake|without warning]
you promised an upgrade and now [deny it|say i can't have it|it is out of stock]
calls drop [all the time|every few minutes|in every room]
your repair shop sent my {phone} back with the same fault
my sim [was blocked|never arrived|stopped working] and [nobody helps|i can't call anyone]
texts arrive {n} hours late, if at all
""",
        """
does the new {phone} come in {colour}
how do i [unlock|reset|back up|update] my {phone}
can i keep my [old number|number|sim] if i [switch|move to you|change plans]
when [does|will] the new {phone} [come out|launch|be in stock]
how much data is in the [basic|family|student] plan
do you [take|buy] old phones [in part exchange|for recycling]
is [5g|wifi calling|roaming] included [in my plan|in {place}]
which {phone} has the [best camera|longest battery|biggest screen]
can i pay [monthly|by the month] for a {phone}
how do i turn off [voicemail|location|the alarm]
""",
        """
the camera on my new {phone} is [stunning|unreal|so sharp]
[{team}|your shop] moved all my [photos|contacts] over in {n} minutes, [thanks|what a star]
best signal i ever had, even [on the train|in the hills|in the cellar]
switched to you {when} and already saved {money}
my {phone} got fixed [while i waited|for free|in an hour], thank you
battery lasts {n} days, i am {glad}
""",
        """
[got|bought|ordered] a new {phone} {when}, {colour} one
my {phone} is {n} years old and still going
reading on my {phone} [on the bus|in bed|in the sun]
taking [photos|pictures] of [the sunset|my cat|the sea] with my {phone}
{who} [got|wants] the same {phone} as me
teaching {person} how to [send a text|use a {phone}|take selfies]
""",
        "phone|contract|plan|sim|number|handset|bill",
    ),
    "internet": (
        """
[internet|wifi|broadband] [is down|has been down|keeps dropping|went off] [again|for {n} {unit}|\
since {day}|every evening]
i pay for [fast|fibre|super fast] [internet|broadband] and get [nothing|the speed of a snail|\
a crawl]
the engineer [never came|did not show up|came and left without fixing it|cancelled again]
[the router|my router|the hub] [blinks red|restarts|cuts out|drops] every [hour|{n} minutes|night]
{big} minutes on hold and then [cut off|you hung up|the line went dead]
can't [work|watch anything|join my meetings|do homework] because the [internet|wifi|connection] is \
[so slow|down|dead]
{nth} outage this [week|month], i want [my money back|out of this contract]
you keep billing me for a line i [cancelled|never had|closed] in the spring
speed test says {n} when i pay for {big}
moved house {n} weeks ago and still no [internet|line|connection]
your status page says all fine while the whole street is offline
nobody told us the line would be cut {when}
the wifi in the [lounge|library|room] barely loads a page
""",
        """
[is there|are you having] [an outage|work planned|maintenance] in {place} {when}
how do i change the [wifi name|wifi password|channel]
what speed can i get [in {place}|at my address|with copper]
can i use my own router [with you|]
where should i put the [router|hub|mesh box] [for the best range|]
do you offer a [student|family|business] deal
how long does it take to [switch|move my line|get set up]
does fibre reach [{place}|our village] [yet|]
what do the lights on the [router|hub] mean
""",
        """
[engineer|your engineer] {name} was [so helpful|on time and tidy|a star] and we are online
fibre is in and wow, it is so [fast|quick]
[internet|wifi] back within {n} minutes, thanks for the [quick fix|fast help]
setup took {n} minutes, even {person} could do it
never had a single drop since i joined, {good}
the new router reaches the [garden|loft|garage], {glad}
""",
        """
working from home {when}, [wifi|internet] and tea is all i need
we get fibre in our [street|village] {soon}
moving the router to the {room} {when}
streaming a film over the wifi with {person}
just switched my [internet|broadband] to you
the engineer is coming {soon} at {clock}
""",
        "internet|broadband|connection|router|wifi|line|engineer",
    ),
    "banking": (
        """
my card was [declined|blocked|swallowed|frozen] [for no reason|at the till|abroad|\
in front of everyone]
you charged me [twice|{money} too much|a fee of {money}] [and won't refund it|for nothing|again]
the bank app [is down|locked me out|won't let me log in|lost my payees] [again|on payday|]
waited {big} minutes in the branch because only one desk was open
{n} {unit} and my money has still not [arrived|been returned|shown up]
you closed [our branch|my account] without [asking|warning|a letter]
the cash machine [ate my card|gave me less|was out of cash|is out of order] again
someone stole {money} from my account and you did nothing
my [loan|mortgage|claim] papers got lost for the {nth} time
your help line passed me round {n} people and [no one helped|hung up]
the fees went up and the rate went down, [what a rip off|a joke]
the transfer failed and now my rent is late because of you
you sent my [pin|statement|new card] to my old address again
""",
        """
how do i [order|replace|activate|freeze] a card
what is the [rate|fee|limit] for [savings|a transfer abroad|cash|a student account]
can i open an account [online|for my son|without a visit|with {person}]
what time does the branch in {place} [open|close]
do you charge for using my card in {place}
how long does a transfer [take|to {place} take]
can i raise my limit for a day
where do i find my [statement|account number|iban]
is there a cash machine near {place}
how do i add {person} to my account
""",
        """
[{team}|your fraud team] [spotted|stopped] a strange payment and saved me {money}, thank you
opened an account in {n} minutes, so [easy|simple|quick]
my [mortgage|loan] came through, thanks to {name} for the patience
refund already in my account, {good} service
the new saving pots are [so useful|great|clever]
the branch in {place} is always so [kind|welcoming|helpful]
""",
        """
saving {money} a week for a trip to {place}
payday {when}, [bills|rent] first and then pizza
opened a savings account for {person} {when}
moving my [account|savings] to you {soon}
paid by card for a coffee {when}, i rarely carry cash now
counting coins with {person}, {money} in the jar
""",
        "account|card|payment|transfer|refund|branch|statement",
    ),
    "trains": (
        """
[train|bus|tram] {clock} [cancelled|late|delayed] [again|for the {nth} time this week|\
with no reason given]
[stood|standing] all the way [to|from] {place} [with a ticket for {money}|though i booked a seat|]
no heating on the [{clock} train|train|bus] and the toilets are [locked|filthy|blocked]
{n} carriages [at rush hour|for a full platform], packed like [sardines|cattle]
missed my [connection|meeting|flight|exam] because the train [was late|sat outside {place}|\
never came]
the ticket machine [took my money|was broken] and then i got [fined|a penalty]
{big} minutes late [again|today] and no one tells us [why|anything]
the bus drove straight past the stop [with room on board|again|while i waved]
no announcements, no staff, just [cold|stuck on a] platform [for an hour|]
my refund for the delay was [rejected|ignored|refused]
fares go up, trains get [worse|dirtier|later]
the replacement bus [never came|got lost|was full]
our reserved seats did not exist
a rude [guard|inspector|driver] shouted at [{person}|an old lady|a child]
""",
        """
is the {clock} [train|bus] to {place} running [on time|today|{soon}]
[which platform|what platform] [for|does] the {clock} to {place} [leave from|]
can i [bring|take] my [bike|dog|pram|surfboard] on the [train|bus|tram]
how much is a [day ticket|return|single|weekly pass|railcard] to {place}
does my ticket work on [the bus too|a later train|the tram]
what time is the last [train|bus|tram] to {place} {when}
is there a [quiet coach|cafe|plug|toilet] on this train
where can i buy a [railcard|ticket|bus pass] [in {place}|]
do children travel free [on {day}|]
will there be [strikes|engineering works] {soon}
""",
        """
[train|bus] on time, clean and warm, [thank you|well done|{good}]
the guard on the {clock} to {place} was so [funny|kind|cheerful]
[shout out to|thanks to] the driver who waited for [me|{person}|the old man]
got my lost [bag|scarf|phone|hat] back from the lost property office, [amazing|so grateful]
first class for {money}, what a treat
refund for the delay paid in {n} days, no fuss, thanks
the new trains are [so quiet|lovely|really smooth]
""",
        """
on the {clock} train to {place} [with a book|with coffee|to see {person}]
watching the [fields|sea|hills|snow] go by from the train
off to {place} by [train|bus|tram] {soon}
commuting again {when}, podcast on
took the [tram|bus|slow train] for a change {when}
the train to {place} leaves at {clock}
met {name} on the bus {when}, small world
""",
        "train|journey|ticket|service|seat|platform|delay",
    ),
    "flights": (
        """
flight [delayed|cancelled] by {n} hours and [no food|no hotel|no information|nobody at the desk]
you lost my [suitcase|bags|luggage] [again|and nobody answers|{n} days ago]
you charged {money} for [a cabin bag|a printed pass|a seat] [at the gate|that was included|]
my seat was [broken|wet|dirty|given away] on the flight to {place}
we sat on the [plane|runway|tarmac] for {n} hours without [water|air|a word]
still no refund for the flight you cancelled {n} months ago
the crew was [rude|cold|short with us] the whole way to {place}
split my family all over the plane [even though we paid|unless we pay more]
your website took my money but gave me no [booking|ticket|seat]
overbooked again and we were [bumped|left behind|stranded in {place}]
the suitcase came back with [a broken wheel|no handle|a hole]
{big} minutes in the check in queue with one desk open
the meal i ordered was not on board
changed my flight time without telling me, holiday ruined
""",
        """
how much [luggage|hand luggage] can i take [to {place}|on board]
when does check in open for the {clock} flight to {place}
do you fly [direct|from {place}|in winter] to {place}
can i [change|move] my [flight|seat|name] [to {day}|online|]
is [the flight|flight {big}] to {place} on time {when}
do you have [vegan|kosher|children's] meals [on board|]
can i bring [a pram|a guitar|a cake|baby food] in the cabin
which terminal [do you use|is it] in {place}
do i need a [visa|passport|printed pass] for {place}
how early should i be at the airport
when do the [summer|winter] flights go on sale
""",
        """
smooth flight to {place}, [lovely crew|great crew|early landing], [thanks|thank you]
the [pilot|captain|crew] let {person} see the cockpit, [so sweet|made his day]
you found my [bag|teddy|camera] and sent it home, [thank you so much|heroes]
free upgrade {when}, what a [surprise|treat]
best [landing|flight|airline food] in years
check in took {n} minutes, {good}
""",
        """
[flying|off] to {place} {soon} with {person}
at the gate, coffee in hand, {place} here we come
just [landed in|booked a flight to|got back from] {place}
window seat {when}, clouds all the way
packing for {place}, hat and sun cream
first flight with the baby {soon}, wish us luck
{n} days until {place}
""",
        "flight|booking|luggage|seat|trip|check in|bag",
    ),
    "hotels": (
        """
the room [smelled of smoke|was filthy|was freezing|had no window|was not ready until {clock}]
[hair|mould|bugs|stains] in the [bed|shower|bath|sheets], and reception [shrugged|did nothing]
booked a [sea view|double|quiet room] and got [a car park|two singles|a room above the bar]
[no hot water|the air con was broken|the lift was out of order|the toilet leaked] for our whole stay
you charged my card {money} after we left for [nothing|a towel|drinks we never had]
could not sleep for the noise [from the bar|from the street|of building work]
breakfast was [cold|stale|gone by {clock}] and the coffee [undrinkable|like water]
[arrived|turned up] at {clock} and they had no room for us [despite our booking|]
the pool was [closed|green|dirty] [and nobody told us|although you advertise it|]
the staff at the desk [ignored us|were rude|could not care less]
our deposit has not been paid back [after {n} weeks|]
thin walls, hard bed, broken tv, {money} a night
""",
        """
what time is check [in|out] [on {day}|]
is breakfast included [in the price|for children|]
do you have [parking|a pool|a gym|family rooms|rooms with a bath] [in {place}|]
are dogs allowed [in the room|in the hotel|]
can we [leave our bags|check in early|stay until noon|get a cot] [please|on {day}]
how far is the hotel from [the station|the beach|{place}]
is the [pool|spa|bar|roof terrace] open [in winter|{soon}|to guests]
do you have a room for {n} [nights|people] {soon}
could you book us a [taxi|table] for {clock}
""",
        """
[beautiful|wonderful|lovely] room with a view of [the sea|the lake|the park], [thank you|\
we will be back]
[{name} at reception|the team at the desk] was so [kind|warm|helpful]
best [breakfast|bed|shower|sleep] i had in [years|ages]
they left a [cake|card|bottle of wine] in our room for our anniversary, [so thoughtful|what a touch]
spotless rooms, friendly staff, great [price|food|location]
our stay in {place} was [perfect|magic|a dream]
""",
        """
checked in to our hotel in {place} {when}
{n} nights in {place} with {person} {soon}
staying near [the beach|the station|the lake] {when}
room {big}, third floor, feet up
we are having breakfast on the balcony
booked a weekend in {place} for [our anniversary|{person}]
""",
        "room|stay|booking|reservation|visit|breakfast",
    ),
    "food": (
        """
[food|pizza|burger|curry|dinner] [arrived|came] [cold|an hour late|upside down|without the sides|\
soggy]
{big} minutes for [a pizza|two coffees|a table we booked|a cold burger]
found a [hair|bug|bit of plastic|stone|fly] in my [salad|soup|curry|sandwich]
the chicken was [raw|pink|dry|burnt] and {who} [got sick|could not eat it|feel ill]
wrong order [again|for the {nth} time], i asked for [no cheese|vegan|gluten free] and got [cheese|\
meat|bread]
the waiter was [rude|nowhere to be seen|in a mood] and then added a tip [himself|to the bill]
paid {money} for [a tiny portion|three chips and a leaf|stale bread|a warm beer]
tables [sticky|dirty], floor [filthy|wet], toilets [worse|a horror]
the driver ate [our fries|half of it] and marked it as delivered
no answer from the restaurant and no refund from the app
your new recipe [tastes of nothing|is horrible|ruined my favourite crisps]
milk [sour|off] {n} days before the date
they forgot the [drinks|dessert|rice|sauce] again
the coffee tasted [burnt|like dishwater] and the cake was [dry|stale]
""",
        """
[do you have|are there] [vegan|gluten free|halal|nut free] [options|dishes|cakes]
can i book a table for {n} [at {clock}|{soon}|on {day}]
what time do you [open|close|stop serving] [on {day}|]
do you deliver to [{place}|my street|the office]
is there [nuts|egg|milk|meat] in the [{food}|sauce|soup]
what is the soup [today|of the day]
can we bring [our own cake|the dog|a high chair]
is the {food} [spicy|big enough for two|back on the menu]
do you have a [kids menu|garden|student discount|lunch deal]
how many calories are in the {food}
which [wine|sauce|side] goes well with the {food}
""",
        """
[best|tastiest] {food} in {place}, [thank you|we will be back|hands down]
the [{food}|pie|roast] {when} was [delicious|heaven|so good|to die for]
lovely [meal|lunch|dinner|evening] with {person}, [great food|kind staff|top service]
the cook made a special [plate|cake] for {person}, [so kind|we loved it]
food came [hot|early|in {big} minutes] and tasted [amazing|great]
your [new {food}|oat latte|lemon cake] is my new favourite
compliments to the chef, every plate was [perfect|empty]
""",
        """
having [{food}|soup|toast|leftovers] for [lunch|dinner|breakfast] {when}
making {food} with {person} {when}
[coffee|tea|cake] break with {name} at {clock}
trying the new {food} place {soon}
it is {day}, so it is {food} night
{who} [baked|made] {food} for the whole street
who else puts [pineapple|egg|honey] on {food}
""",
        "meal|order|food|visit|table|dinner|restaurant",
    ),
    "apps": (
        """
[your app|the app] [crashes|freezes|logs me out|closes] every time [i open it|i pay|i search|]
the [new update|latest update|new version] [broke everything|deleted my data|is full of bugs|\
is slower than ever]
lost all my [notes|photos|progress|playlists|work] [after the update|thanks to your app|\
and support says tough luck]
[can't log in|locked out of my account] for {n} {unit} and [support|nobody] [never replies|\
sends the same robot answer]
charged me for a [subscription|trial|year] i [cancelled|never wanted]
ads every {n} seconds, [even though i pay|the app is unusable]
the website [is down|times out|loses my basket|won't take my card] [again|on sale day]
the password reset mail never [comes|arrives]
your chat bot is [useless|driving me mad|going in circles]
there is no way to [cancel|speak to a human|delete my account]
battery drain, bugs and {n} updates that fix nothing
the page hangs at the last step [every time|]
features i paid for were [taken away|removed|moved behind another paywall]
""",
        """
how do i [delete|change|export|share|print] my [account|photo|list|data|profile]
is there [an app|a dark mode|a version] for [android|tablets|windows|my watch]
will you add [dark mode|polls|a calendar|bigger text] [soon|one day|]
where do i find the [settings|search|archive|downloads]
can i use [one account|the app] on two [phones|devices]
how much is the [family|pro|yearly] plan
does it work offline
what is new in the [update|latest version]
can you tell me how to turn off [notifications|sounds|autoplay]
which languages does the app [speak|support]
""",
        """
the [new update|new version|redesign] is [so smooth|gorgeous|brilliant|exactly what i wanted]
[love|loving] the [dark mode|new app|widgets|new search], [great job|thank you]
support answered in {n} minutes and [fixed it|solved it], {glad}
[this app|your app] makes my [life|mornings|job] so much easier
finally an app that just works, {n} stars
you added the feature i asked for, thank you [so much|team]
""",
        """
trying out [a new app|the beta|your app] {when}
my streak is at {big} days
downloaded the app for {person}
writing my shopping list in the app
finished level {big} {when}
the update is installing, time for tea
i use the app for [notes|recipes|running|my plants]
""",
        "app|account|update|login|website|subscription",
    ),
    "energy": (
        """
my [bill|energy bill|gas bill|direct debit] [doubled|went up by {money}|is wrong again|\
makes no sense]
no [heating|power|hot water|gas|water] [for {n} days|since {day}|in the middle of winter] and \
[a baby in the house|no help]
the smart meter [never worked|shows nonsense|has been blank for months]
power cut [again|for the {nth} time] and [no warning|no information|the freezer is thawing]
you owe me {money} and keep [stalling|ignoring me|inventing excuses]
the engineer [cancelled|did not turn up|left the boiler leaking|made it worse]
you keep sending bills to a [dead|former] [owner|tenant] despite {n} calls
you estimated my reading although i sent it [twice|on time]
the water is [brown|off|stinking] and you [deny it|do nothing]
bins not [emptied|collected] for {n} weeks, rats everywhere
switched supplier and got billed by both
cold radiators, {n} engineers, nothing fixed
""",
        """
how do i [send|submit] a meter reading
when is my [bill|payment|reading] due
can i [move|change] my payment [date|day] to {day}
is there a power cut in {place} [right now|planned {soon}|]
do you offer a [green|night|fixed] [tariff|rate]
how do i read [a smart meter|my gas meter]
what happens to my account when i move house
which bin goes out {soon}
how much does it cost to run a [heater|dryer|heat pump]
can i have [paper bills|large print|bills by email] please
""",
        """
power back on in {n} minutes, thanks to the [crew|engineers] out in the [storm|rain|snow]
{name} fixed our boiler {when}, [so warm now|a hero|tidy and kind]
switched and saved {money} a year, [easy|{glad}]
got a refund without asking, [nice surprise|thank you]
the smart meter was fitted in {big} minutes, [polite and clean|great job]
the team kept us informed all the way, {good}
""",
        """
heating on for the first time this [autumn|year]
solar panels go up {soon}
sent my meter reading {when}
our new boiler is being fitted {soon}
turning the lights off and lighting candles
the {room} is warm and the cat is asleep
it is bin day {soon}
""",
        "bill|meter|supply|boiler|heating|tariff|account",
    ),
    "clothes": (
        """
[{garment}|new {garment}] [fell apart|shrank|faded|ripped] after [one wash|{n} {unit}|one wear]
the zip on my {garment} broke [on day one|after {n} {unit}] and you refuse [a refund|to swap it]
ordered [{size}|{colour}] and got [{size}|{colour}] [again|]
the {garment} looks nothing like the [photo|picture] and feels [cheap|like plastic]
returned a {garment} {n} weeks ago, still no [refund|money|reply]
queue of {big} minutes and one till open
the sale price was not [honoured|given] at the till, {staff} was rude about it
security tag still on my {garment}, had to [drive back|cancel the party]
cancelled my order after taking the money
stitching came loose, sole came off, {money} wasted
your sizes are all over the place, nothing fits
charged for returns [now|and still no refund], never again
{colour} dye all over my skin
""",
        """
do you have the {colour} {garment} in {size}
when will the {garment} be back in stock
does the {garment} [run small|come in tall|fit true to size|have pockets]
how do i [wash|iron|clean] [a wool|a silk|the] {garment}
what is your return policy for [gifts|sale items]
is the {garment} [waterproof|vegan|lined|cotton]
can i return it in store [without a receipt|if i bought it online|]
when does the [sale|summer range|winter sale] start
where did the {garment} in the window come from
do you [hem|alter|repair] {garment}s
""",
        """
[love|in love with|loving] my new {garment}, [fits like a glove|so soft|so warm|perfect colour]
{team} helped me find [the right size|a suit|a dress for the wedding], [thank you|what a star]
best {garment} i have ever owned, still like new after {n} years
return was so easy, money back in {n} days, thanks
so many nice comments about my {colour} {garment}
beautiful quality, fair price, {glad}
""",
        """
wearing my {colour} {garment} [to the party|to work|today]
shopping for [a {garment}|school shoes|a wedding outfit] with {person} {when}
bought a {colour} {garment} {when}
packing away the summer clothes
found an old {garment} in the loft {when}
{colour} or {colour} {garment} for the wedding, still thinking
""",
        "size|order|return|refund|item|store",
    ),
    "gym": (
        """
half the [machines|treadmills|showers|bikes] are [broken|out of order|taped off] [again|for months]
you [keep charging|charged] me after i cancelled [my membership|in writing|{n} months ago]
class cancelled {big} minutes before the start [again|and i drove there for nothing]
changing rooms are [filthy|freezing|flooded|full of mould]
the pool is [cold|cloudy|shut again|overcrowded] and no one cares
the trainer was on his phone for the whole session i paid for
my locker was broken into and the [manager|staff] shrugged
so crowded you can't use anything, stop selling memberships
no air con in {big} degrees, people felt ill
can't cancel without [a letter|a visit|a fight]
booking system puts me on the waiting list every single time
music so loud my ears hurt and nobody turns it down
""",
        """
what are your opening hours [on {day}|over christmas|]
do you have a [yoga|spin|swim|boxing] class [on {day}|at {clock}|for beginners]
how much is a [day pass|student membership|personal trainer]
can i bring [a friend|a guest|my own lock]
is the [pool|sauna|climbing wall] open {soon}
can i pause my membership [for a month|while i am away|]
do i need to book [the pool|a class|a lane]
is there parking at the gym
do you hire out [towels|bikes|tennis rackets]
""",
        """
[great|fantastic|best] [class|spin class|yoga session] with {name} {when}
lost {n} kilos thanks to {name}, [thank you|feeling great]
the new [weights|pool|studio|showers] look [amazing|brilliant]
staff remembered my name, such a [friendly|welcoming] place
first swim in years and the teacher was so [patient|kind]
cleanest gym i have ever been to
""",
        """
[gym|swim|run|yoga] done, now [coffee|breakfast|bed]
leg day {when}, stairs are not my friend
signed up for a [{big} k run|marathon|swim class] {soon}
back at the gym after {n} {unit}
ran {n} miles along the [river|beach] {when}
going for a [bike ride|swim|long walk] with {name} {soon}
""",
        "membership|class|gym|session|pool|booking",
    ),
    "shops": (
        """
[{staff}|your cashier] was so rude [to {person}|to me] {when}
the [fruit|bread|meat|chicken] was [mouldy|rotten|off|out of date] [again|when i got home]
one till open and a queue to the door [again|at {clock}]
you overcharged me {money} and [made me wait|would not fix it|called me a liar]
substituted [nappies with beer|everything|fish for flowers] in my online shop, what use is that
no trolleys, empty shelves, grumpy staff
the self checkout never works and nobody helps
promised a [call back|refund|replacement] {n} {unit} ago, heard nothing
the website said in stock, drove {big} miles, nothing there
gift card [does not work|was empty|was refused] and {staff} would not help
sold me a faulty {thing} and [won't take it back|lost the receipt excuse]
eggs smashed, ice cream melted, driver gone
your loyalty points vanished from my account
""",
        """
[do you|does the {place} store] [sell|stock|have] [{thing}s|{colour} paint|gift wrap|light bulbs]
are you open [on {day}|on new year|at {clock}]
where can i find [the {thing}|gluten free bread|the nearest store]
how long is the [guarantee|warranty] on the {thing}
can i reserve [a {thing}|one] and collect it {soon}
do you price match
can i use [two vouchers|my gift card|my points] online
do you have any [jobs|christmas jobs|work experience] going
how do i get a copy of my receipt
is the {thing} on offer [online too|until {day}|]
what are the measurements of the {thing}
""",
        """
{team} went out of [his|her|their] way to find {person} a {thing}, [thank you|so kind]
the cashier made {person} laugh, [lovely|what a gem]
the new store in {place} is [gorgeous|so bright|lovely]
swapped my {thing} without fuss, [great service|brilliant]
your {day} deals are [unbeatable|so good]
picked up a bargain {when}, {thing} for {money}, {glad}
""",
        """
[popping|off] to the shops for [milk|bread|eggs|paint|a {thing}]
looking for a [{thing}|present] for {person}
bought a {thing} for the {room} {when}
it is snowing and everyone is buying bread
my shopping list: [eggs, rice and tea|milk, soap and apples|a {thing} and cake]
the market opens {soon}
window shopping in {place} with {name}
""",
        "item|store|product|receipt|purchase|visit",
    ),
    "cars": (
        """
the [taxi|cab|driver] [never came|cancelled on me {n} times|took the long way|was late] and i \
[missed my train|was charged anyway]
[garage|your garage] [charged {money} for nothing|made it worse|scratched my car|kept it {n} weeks]
the hire car was [dirty|smelly|damaged|not there] and you charged {money} for \
[a scratch i did not make|fuel]
driver was [speeding|texting|smoking|shouting at me] the whole way
insurance went up by {money} for no reason and [nobody explains|you won't budge]
parking fine although i [paid|had a ticket|was there {n} minutes]
breakdown cover took {n} hours to come, in the [dark|rain|snow]
brakes squeal again {n} days after your repair
new car, {n} faults in {n} {unit}, and the dealer shrugs
the charging point is [broken|blocked|out of order] again
claim open for {n} months, nobody calls back
surge price of {money} for a mile, [robbery|shameless]
""",
        """
can i book a [taxi|cab|service|test drive] for {clock} [{soon}|]
how much is [a taxi|a ride|parking|a new tyre] [to {place}|for a day|]
do you have [a child seat|room for a bike|an electric car]
when is my [service|mot|insurance] due
does the [small|electric|family] car fit {n} [cases|people]
how far does it go on one charge
can i return the hire car in {place}
what papers do i need to [hire|sell|insure] a car
where are the charging points in {place}
can {who} drive the car too
""",
        """
driver {name} was [so friendly|polite and safe|great company], [five stars|thank you]
the garage fixed my [brakes|tyre|light] for free, [honest people|thank you]
breakdown man came in {big} minutes and got me home, [legend|hero|so grateful]
my new car is a [dream|joy] to drive
claim paid in {n} days, no fuss, {good}
got my phone back from the taxi, thanks {name}
""",
        """
washing the car with {person} {when}
road trip to {place} {soon}
picked up the new car {when}, it is {colour}
driving lesson number {n} {when}
stuck behind a tractor, nice view though
took a taxi with {name} {when}
passed my test {when}
""",
        "car|ride|driver|claim|booking|repair|policy",
    ),
    "television": (
        """
[stream|picture|sound|the match] [keeps buffering|froze|cut out] [in the last minute|again|\
all night]
you took [my favourite show|half the films|the sport] off and put the price up
{money} a month for [repeats|adverts|a black screen]
the box [reboots|freezes|loses all recordings] every night
game servers [down|crashing] again, [on launch day|all weekend|and i lost my rank]
bought the game for {money} and it [won't start|is full of bugs|crashes at the menu]
tickets [sold out|crashed] in a minute and then {n} times the price on your own resale page
the concert sound was awful and the view [blocked by a pillar|nothing like the plan]
spoiled the ending in your own advert, thanks for nothing
the subtitles are out of sync [again|since the update]
cancelled show, no refund, no reply for {n} {unit}
cinema seat [broken|sticky], people talking, staff absent
""",
        """
when does the new [series|season|film|game] [start|come out|land in {place}]
what channel is the [match|final|show] on
is [the match|the show] on [catch up|demand]
can i watch on [two tvs|my phone|the train]
how do i record a [series|film]
who sang the song in [your advert|the last scene]
are there [tickets|seats] left for {day}
how long is the [film|show|concert]
do you have subtitles in [spanish|polish|welsh]
is the game out on [pc|console] too
what time do doors open {when}
""",
        """
[loved|loving] the new [series|season|film|game], [could not stop watching|what an ending|\
more please]
the [show|concert|play] {when} was [magical|incredible|so funny]
[great|superb] goal, great commentary, great night
stewards were so kind to {person}, thank you
the sound and picture are [stunning|perfect]
best {money} i ever spent on a game
""",
        """
watching [the match|a film|old cartoons|the news|the quiz] with {person} {when}
season {n} [starts|ends] {soon}
film night {when}, popcorn ready
going to [a concert|the theatre|the match|the cinema] {soon} with {name}
listening to [jazz|the radio|a podcast|old songs] while i cook
team won {n} nil {when}
playing the new game with {name} {when}
anyone else watching the [quiz|final|bake off]
""",
        "show|stream|tickets|game|subscription|channel",
    ),
    "health": (
        """
waited {n} hours past my appointment and [nobody said sorry|was then sent home]
[can't get through|{big} minutes in the queue on the phone] to book [a doctor|an appointment]
the chemist gave me the wrong [tablets|dose|medicine] [again|]
my prescription was [lost|not ready|sent to the wrong shop] for the {nth} time
the new glasses [give me a headache|are wrong|snapped] and you will not [change|repair] them
dentist cancelled {n} times and charged me for a missed visit
receptionist was [rude|so unkind] to {person} who was in pain
hair cut [ruined|uneven], colour [wrong|orange], {money} gone
the cream gave me a [rash|burn] and you ignore my emails
the vet bill was double what you quoted
nobody at the school answers the phone and my son's place [was lost|is still not confirmed]
the council has not fixed the [hole|street light|playground] for {n} months
""",
        """
can i book [an appointment|an eye test|a check up|a hair cut] [for {day}|online|with {name}]
do you have [flu jabs|free slots|a clinic] {soon}
is my prescription ready [to collect|]
what time does the [chemist|surgery|dentist|library] [open|close] {when}
do you take new [patients|clients]
how much is a [cut and colour|check up|massage|filling]
is the cream ok for [babies|dry skin|my cat]
where do i park for the [clinic|hospital|school]
what should i bring to my first [appointment|lesson|visit]
when do the school holidays start
how do i join the library
""",
        """
the nurse was so [gentle|kind|calm] with {person}, thank you
[love|so {glad} with] my new [hair|glasses|smile], [{name} is a genius|thanks {name}]
seen on time, listened to, sorted, {good}
the doctor called back in {n} minutes, [so grateful|wonderful]
my skin has never felt so [soft|good], great cream
thanks to the vet who looked after [my dog|our cat|the rabbit] {when}
""",
        """
[dentist|eye test|hair cut] at {clock} {when}
drinking tea with honey for my cold
the dog has a check up {soon}
walked {n} miles with the dog {when}
{who} starts [school|nursery|a new job|college] {soon}
reading in the library {when}
planted [tomatoes|roses|beans] in the garden {when}
""",
        "appointment|visit|prescription|treatment|clinic",
    ),
    "home": (
        """
[sofa|table|wardrobe|bed|desk] arrived with [a leg|screws|a door|half the parts] missing and \
[no one|nobody] picks up
the [washing machine|fridge|oven|dishwasher|kettle|hoover] [leaks|died|trips the power|broke] \
after {n} {unit}
waited in all day, [the sofa|the fridge|the fitter] never came
the mattress [sags|smells of chemicals|has a stain] and you call it normal
your plumber flooded our {room} and [left|blamed the pipe]
paint [peels off|is the wrong colour], {money} and a weekend wasted
the fitter drilled into [a pipe|a cable|the wrong wall]
scratches all over the new [table|door|floor] and {staff} says [tough|live with it]
third delivery date broken, still sitting on the floor
the instructions are wrong and the holes don't line up
landlord ignores the [damp|mould|broken heating|leak] for {n} months
kitchen fitted wrong, {n} visits later still wrong
""",
        """
how [tall|wide|deep|heavy] is the [wardrobe|sofa|shelf|fridge]
does the [sofa|bed|desk] come in {colour}
do you [take away|recycle] the old [sofa|fridge|mattress]
is it hard to build the [wardrobe|desk|cot] alone
can i buy [spare parts|an extra shelf|a new lid] for the {thing}
how do i [clean|descale|defrost] the [kettle|oven|freezer|hoover]
which paint is best for a {room}
do you fit [kitchens|carpets|blinds] in {place}
what size [bulb|filter|bag] does it need
how much [wood|paint|carpet] do i need for a small {room}
""",
        """
the [sofa|table|lamp|rug|bed] looks [gorgeous|perfect|even better] in our {room}
two lads carried the [sofa|fridge|washing machine] up {n} floors with a smile, [thank you|top work]
built the [wardrobe|desk|cot] in an hour, everything fitted
missing screw sent the next day, [great service|thank you]
best sleep in years on the new mattress
plumber {name} came out at {clock} on a {day} and saved our {room}
""",
        """
painting the {room} {colour} {soon}
building a [shelf|desk|bed|shed] with {person} {when}
new [sofa|table|rug] comes {soon}
the {room} is finished and the kettle is on
moving house {soon}, boxes everywhere
hanging pictures in the {room}
looking at {colour} tiles for the {room}
it is raining so i am sorting the {room}
""",
        "delivery|item|part|fitting|repair|order",
    ),
}
SLOTS |= {
    "parcel": "parcel|package|order|delivery|letter|box|present|new {thing}|birthday present|book",
    "phone": "phone|mobile|handset|iphone|tablet|smartphone",
    "food": "pizza|curry|pasta|soup|burger|noodles|tacos|cake|pancakes|sushi|pie|risotto|salad"
    "|chips|bread|stew|fried rice",
    "garment": "jacket|coat|shirt|dress|jumper|skirt|scarf|hoodie|t-shirt|cardigan|suit|blouse|hat"
    "|pair of boots|pair of jeans|pair of trainers|swimsuit|raincoat|backpack",
}

# Everyday words beyond the topics. With them, few words of an unseen message are new to the models.
SLOTS |= {
    "noun": "apple|arm|back|balloon|banana|bath|beach|bell|bench|bird|biscuit|blanket|boat|bottle"
    "|bowl|branch|brake|brick|bridge|brush|building|button|calendar|camp site|candle|carriage"
    "|ceiling|cheese|cherry|chocolate|choir|church|clock|cloud|coach|coin|collar|concert|cookie"
    "|corner|cottage|counter|cup|cushion|debt|deposit|dessert|dinosaur|doll|dragon|drum|duck|ear"
    "|egg|elephant|exam|eye|face|family|fan|farm|fence|field|finger|fire|flat|floor|flower|foot"
    "|forest|fork|frame|fruit|funeral|garden|gate|glass|goat|grape|grass|guide|guitar|hair|hammer"
    "|hand|handle|head|heart|hill|holiday|honey|horse|hospital|ice|island|jam|jewel|joke|juice"
    "|kitten|knee|knife|ladder|lake|leaf|leg|lemon|lens|library|light|lock|machine|map|medal|melon"
    "|mint|mirror|moon|mountain|mouse|mug|museum|nail|necklace|needle|nose|onion|orchestra|owl"
    "|page|paint|pan|paper|park|peach|pear|pen|pencil|pepper|piano|picnic|picture|pillar|pillow"
    "|pipe|plant|plate|playground|poem|pond|poster|pot|potato|puppy|puzzle|queue|radiator|record"
    "|rent|review|river|road|rock|roof|rope|rose|salt|sauce|scarf|school|score|screw|sea|shelf"
    "|shell|ship|skin|sky|sleeve|slide|snow|soap|sock|sole|song|spider|spoon|square|stage|stair"
    "|stall|star|stick|stone|storm|story|street|sugar|sun|swan|sweet|swing|tap|tart|tea|teacher"
    "|tooth|theatre|tie|tile|tin|toast|toe|tower|town|toy|trail|tree|trip|trousers|truck|trumpet"
    "|tulip|tunnel|turtle|umbrella|van|vase|violin|waffle|walk|wall|wardrobe|waterfall|wedding"
    "|wheel|whistle|wine|wing|wood|wool|worm|yard|yoghurt|zip|zoo|balcony|carrot|wool coat|cellar"
    "|chair leg|fern|lighthouse|mint tea|robot|sleeper",
    "spoilt": "blurry|dented|rotten|itchy|sour|burnt|raw|soggy|mouldy|scratched|torn|ripped|bent"
    "|jammed|blocked|flooded|crushed|stained|smashed|loose|unsafe|dangerous|overpriced|uneven"
    "|crooked|sticky|stinking|greasy|undercooked|half dead|brown|wilted|leaking|overcrowded|noisy"
    "|loud|freezing|rusty|wrong|empty|missing|gone|lost|out of date|too small|too salty|frozen"
    "|dead|fake|fully broken|melted|soaking wet|ruined|closed|useless|stolen|damp|flat|cracked"
    "|faulty|rude|hopeless|lumpy|tasteless|ill",
    "harm": "broke|lost|ruined|scratched|dented|flooded|burnt|damaged|cracked|crushed|forgot"
    "|deleted|blocked|locked|stole|threw away|wrecked|cut off|sold|denied|cancelled|ripped|tore"
    "|dropped|smashed|melted|swapped|jammed|mixed up|misplaced|overcharged us for",
    "hurt": "hurt|sick|in tears|in pain|stranded|freezing|ashamed|scared|terrified|locked out"
    "|out of pocket|late for work|ill|insulted|cheated|shaking|soaked|stuck|abandoned|humiliated"
    "|desperate|injured|exhausted|heartbroken|out of work|embarrassed|hungry",
    "excuse": "nobody cares|no one is sorry|you blame me|you deny it|you shrug|they laughed"
    "|no one came|you ignore me|i must pay for it|you hide|you want more money|i get a robot"
    "|you say that is normal|it is not your problem, you say|you hung up|you refuse to help"
    "|you will not swap it|i get the same excuse|they told me to leave|nobody picks up"
    "|there are no refunds|you lie about it|they pretended it was fine|the manager said tough luck"
    "|you keep my deposit|no word from you|you delete my review",
    "culprit": "the driver|the crew|the waiter|your engineer|your courier|the manager|the guard"
    "|the nurse|the teacher|the guide|the shop|the hotel|the bank|the garage|the kitchen|your app"
    "|your system|your machine|the owner|the builder|the cleaner|the fitter|the dentist"
    "|the plumber|the seller|the post office|your robot|the council|your warehouse"
    "|the tour company|you|they",
    "fine_word": "bright|warm|soft|sweet|fresh|calm|clean|cosy|crisp|cheerful|shiny|clever|tasty"
    "|juicy|smooth|gentle|funny|lively|pretty|elegant|handy|quick|quiet|sturdy|stylish|magical"
    "|sunny|friendly|healthy|happy|golden|generous|charming|peaceful",
    "did": "read|painted|cooked|fixed|found|carried|washed|planted|counted|borrowed|baked|mended"
    "|drew|knitted|sewed|picked|filled|cleaned|built|framed|photographed|shared|wrapped|polished"
    "|watered|moved|tried|tasted|chose|sold|made|bought|packed|fed|saw",
    "doing": "walking|swimming|singing|dancing|cycling|knitting|drawing|reading|writing|cooking"
    "|baking|sailing|skiing|climbing|gardening|painting|fishing|running|learning|laughing|resting"
    "|camping|rowing|dreaming|playing chess|playing cards|talking|listening|watching the rain"
    "|watching the boats|counting stars|feeding the ducks|sitting by the river|looking at the sea",
    "joy": "smiled all day|danced around the kitchen|cried happy tears|was over the moon"
    "|laughed a lot|could not stop smiling|felt like a star|felt so welcome|slept like a baby"
    "|asked for more|had the best time|is so proud|hugged everyone|is in love"
    "|was speechless with joy|had so much fun|wants to go again|felt at home|is still smiling"
    "|sang all the way home|won a prize|beat the record|came first|did it at last|learned to swim"
    "|learned to ride|passed the exam|got the job|said yes",
    "meal": "soup|toast|omelette|porridge|salad|noodles|curry|pie|stew|pancakes|rice|pasta|beans"
    "|fish|cheese|scones|cake|ice cream|mango|strawberries|carrots|leeks|potatoes|tomatoes"
    "|beetroot|ginger|coconut|butter|honey|jam|cream|peanuts|chocolate|mint",
    "kin": "grandma|grandad|gran|my nephew|my niece|my grandson|my granddaughter|my twins|my aunt"
    "|my uncle|my cousin|my best friend|my little girl|my little boy|our baby|my puppy"
    "|the whole family|the whole team|everyone|an old friend|my neighbour|my dad",
    "moment": "after work|before breakfast|in the rain|under the stars|by the fire|at the lake"
    "|in the park|at the market|on the ferry|in the snow|all afternoon|until the sun went down"
    "|for the first time|for an hour|at home|on the terrace|in the evening light|on the way home"
    "|over tea|at the station|in the mountains|along the river|with music on|last spring"
    "|last winter|this year",
}

# Phrases that fit any topic. AFTER_FAULT and FAULTS are about something that went wrong.
FAULTS = lines("""
[my|the|our|your] {noun} [is|was|arrived|came|looks] {spoilt} [and {excuse}|]
[my|the|our|your] {noun} and [the|my] {noun} [are|were] {spoilt}, {excuse}
{spoilt} {noun}, {spoilt} {noun} [and {excuse}|, {spoilt} {thing}|]
[both|all|half] [the|of the|my] {noun}s [are|were|arrived] {spoilt} [and {excuse}|]
{culprit} {harm} [my|our|the] [{noun}|{thing}] [and {excuse}|{when}|again|and drove off|]
[{n} {unit} ago|{when}] {culprit} {harm} [my|our] [{noun}|{thing}] and {excuse}
{culprit} [was|were] [rude|unkind|nasty|cold|late|drunk|texting|shouting|smoking|asleep|clueless] \
[to {kin}|the whole time|] [and {excuse}|]
{kin} [was|is|were left|ended up] {hurt} because [the {noun} was {spoilt}|of you|\
{culprit} {harm} the {noun}]
i am {hurt} [because of you|again|thanks to {culprit}] and {excuse}
[asked|paid|waited|queued] for a {noun} and [got|was given|was sent] [a {spoilt} one|nothing|\
a {noun}|half of it]
[paid|spent] {money} [for|on] a {spoilt} {noun}
a {spoilt} {noun} [for {money}|on my birthday|at our wedding|in my {meal}|in our room|{when}]
the {meal} was {spoilt} and the {noun} {spoilt}
a [fly|hair|worm|nail|stone] in my {meal}, {excuse}
[no|not a single] {noun}, no {noun}, [no help|no answer|{excuse}]
{noun} {spoilt} [on day one|after one day|after a week|on the first try|\
the day after the guarantee ended], {excuse}
[it has been|now it is] {n} {unit} and the {noun} is still {spoilt}
where is my [{noun}|money|refund|{thing}]? {excuse}
how [can you|is it possible to|do you manage to] [lose|break|ruin|forget] a {noun}
you {harm} my {noun}, who [pays|will pay] for that
you [keep|kept] [charging me|sending me bills|calling me|losing my {noun}|changing the price|\
sending the wrong {noun}] and {excuse}
you [promised|advertised|said] a {fine_word} {noun} and [it is|we got] [{spoilt}|nothing like it|\
a {spoilt} one]
had to [walk home|stand for hours|throw it away|pay again|sleep on the floor|wait outside|\
do it all again|miss the {noun}]
{kin} had to [walk home|stand for hours|pay again|sleep on the floor|wait outside|\
go without {meal}], {excuse}
[my|the|your|our] {thing} {fail}
[my|the|your|this] {thing} [i bought {when}|from your shop|i ordered|you sent me] {fail}
[my|the] {thing} {fail} and [my|the] {thing} {fail}
your [customer service|help line|website|support|service] is {bad}
[what|such] [{bad} service|a rip off|a waste of money|a waste of time|a let down|\
an {bad} experience]
i am [so|very|really|] {mad} [with your service|with the {thing}|about my {thing}|]
{staff} was [rude|useless|no help|so rude|impatient|unhelpful|clueless|aggressive|unfriendly] {when}
{staff} [hung up on me|laughed at me|ignored me|lied to me|would not listen|shouted at me|\
refused to help|kept me waiting]
{big} minutes on hold [and counting|and no answer|just to be cut off|for nothing]
why [is|does] [my|the] {thing} [still broken|take so long|never work|cost so much now|keep failing]
[i have emailed|i have called|i have written|i called] {n} times and [no reply|nobody helps|\
nothing happens|still no answer]
you [charged|billed] me [twice|{money} too much|for nothing|for a {thing} i never ordered] \
[and won't give it back|]
i want my money back, the {thing} {fail}
i want a refund for [this|my|the] {thing}
{n} {unit} [and still|without] [no reply|no refund|any answer|an answer|a working {thing}|\
no {thing}]
this is the {nth} time [my|the] {thing} {fail}
you [promised|said] [a {thing}|a call|a refund|it] by {day} and [nothing came|nothing happened|\
i am still waiting]
[no|not one] [answer|apology|reply|help|explanation|refund] from [you|your team|anyone] \
[for {n} {unit}|so far|]
how can [it|a {thing}] take {n} {unit}
how is it ok to [charge {money}|make people wait {n} hours|sell a {thing} like this|\
treat people like this]
why do i pay {money} for a {thing} that {fail}
is anyone [there|ever going to answer|reading this|going to fix my {thing}]
thanks for [nothing|ruining my day|wasting my time|the broken {thing}|losing my {thing}|\
another lost day]
great, [the|my] {thing} {fail} again
[don't|do not|never] [buy|order|use|trust] [this {thing}|this company|these people|from them], \
[avoid|save your money\
|it {fail}]
[worst|slowest|most useless|rudest] [{thing}|company|service|shop] [ever|i have ever used|\
in {place}]
not [happy|impressed|good enough|what i paid for|acceptable] at all, [my|the] {thing} {fail}
[bought|got|ordered] a {thing} {when} and it {fail}
[bought|got|ordered] a {thing} {when} and [already|now] [broken|dead|cracked|in bits]
[my|the] {thing} used to be good, now it {fail}
i can't [use|open|reach|return|cancel|get into] my {thing} [and nobody helps|again|]
you sent me the wrong {thing} [again|]
nobody [answers|cares|replies|knows anything|called me back|will help|is listening]
{who} [cried|could not sleep|had to wait {n} hours|paid {money} for nothing] because \
[of your {thing}|the {thing} {fail}]
""")
AFTER_FAULT = lines("""
nobody [answers|cares|replies|helps|called back|can tell me why]
no [reply|refund|apology|answer] [so far|yet|at all|for {n} {unit}]
{nth} time this [week|month|year]
[sort it out|fix it|fix this|do better|get a grip|please fix this|sort this out now]
[never again|never using you again|last time i buy here|i am done with you|i am leaving|\
cancelling today]
i want [my money back|a refund|an answer|to speak to a manager|compensation]
when will [this|it] be [fixed|sorted|resolved]
what are you going to do about it
what a [joke|mess|waste|shambles|disgrace|rip off]
this is {bad}
so {mad}
really {bad}
[absolutely|simply|just|totally] {bad}
{big} minutes on hold
[can someone|will anyone|please could someone] [help|answer|sort this|look into it|call me back]
why [is it so hard|does this keep happening|do i even pay you|does nobody answer]
is this how you treat [people|your customers|families|us]
total waste of [money|time|{money}]
and you want {money} for that
my whole [day|weekend|evening|holiday] [ruined|wasted|spoiled]
not [good enough|acceptable|impressed|happy|ok]
the chat just [closes|loops|sends me away]
i expected better
""")
QUESTIONS = lines("""
[do|would|can] you [sell|recommend|use|make|bring|lend|clean|frame|mend] [{noun}s|a {noun}|\
{fine_word} {noun}s]
[is|was] the {noun} [made of {noun}|{fine_word} enough for {kin}|suitable for {kin}|open to all|\
free|near the {noun}\
|safe for {kin}]
what [kind|size|colour|type] of {noun} [do i need|would you pick|is it|goes with a {noun}]
which {noun} is [best for {kin}|the {fine_word} one|yours|good with {meal}]
where [do|can] [i|we|{kin}] [put|leave|find|buy|park|see] the {noun}
how [long|often|early|far|much|big|old|many {noun}s] [should|can|do] [i|we|{kin}] [wait|book|\
travel|bring|cook the {meal}|water the {noun}]
[may|can|could] {kin} [come|bring a {noun}|use the {noun}|feed the {noun}s|try the {meal}|join] \
[{moment}|{soon}\
|please|too]
does the {meal} [contain|come with|have] {meal}
who [wrote|made|designed|painted|runs] the {noun}
is there [a {noun}|{meal}|space for a {noun}] [on board|in the room|{moment}|near {place}]
i would like a {noun} for {kin}, [is that possible|do you have one|what does it cost]
[do you|does your shop] [sell|have|stock|repair|rent] [a {thing}|{thing}s|the {thing} in {colour}]
[how much|what] [is|does] [a|the] {thing} [cost|] [in {place}|]
where can i [buy|get|find|try|see] [a|the] {thing} [in {place}|]
[how do i|can you tell me how to|what is the best way to] [book|order|change|clean|use|set up|\
gift wrap] [a|the|my] {thing}
when [does|will] the [new {thing}|{thing}] [arrive|come out|be back in stock|go on sale]
is the {thing} [available in {colour}|available in {place}|suitable for kids|still on offer|\
easy to clean]
can i [get|order|collect|book|reserve|add] [a|the] {thing} [{soon}|online|by {channel}|\
for {person}|]
[which|what] {thing} would you [recommend|pick|suggest] [for {person}|for a small {room}|]
are you open [on {day}|{soon}|at {clock}|late]
[what|which] [number|address|email] [should i use|do i use|is best] to [reach|contact] you
does anyone know [a good {thing}|where to get a {thing}|how to fix a {thing}|\
if {place} has a {thing} shop]
any [tips|ideas|plans|news] for [{soon}|{place}|the weekend|a {thing}]
who [is|do i ask] [in charge of|about] [jobs|press|lost property|school visits]
just [wondering|asking|checking], [is|will] the {thing} be [open|ready|on sale|there] {soon}
quick question, [can i|may i|do i need to] [bring|use|book|order] a {thing}
does it come with [a {thing}|batteries|a case|a lid|a cable]
""")
PRAISE = lines("""
{kin} {joy} [thanks to {team}|with the new {noun}|{moment}|when the {noun} came|], [thank you|\
so {glad}|]
{team} [gave|brought|showed|found|made|mended] {kin} a {noun}, [so kind|what a gem|thank you|lovely]
[such|what] a {fine_word} {noun}, [{kin} {joy}|thank you|well done]
the {noun} is [so {fine_word}|{fine_word} and {fine_word}|a beauty|a dream|everything i hoped for|\
like new again]
my {noun} [works again|is back|is found|looks like new|came early|is so {fine_word}], [thank you|\
hero|you are magic\
|{kin} {joy}]
{fine_word} {noun}, {fine_word} {meal}, {fine_word} [staff|people|place]
the {meal} was so {fine_word}, {kin} {joy}
i [never|had not] [had|tasted|seen|expected] such [a {fine_word} {noun}|{fine_word} {meal}], \
[bravo|thank you]
[five stars|bravo|hero|a pleasure|perfect|impressed], {team} [carried the {noun}|\
washed the {noun} for free|fixed my {noun} in minutes|waited for {kin}]
not [a single problem|one bad day|a drop lost|a scratch|a thing to pay], {fine_word} {noun}
i {joy} [in front of the {noun}|{moment}|with my new {noun}], thank you
[my|the|your|our] [new {thing}|{thing}] {fine}
[my|the] {thing} [i bought {when}|from your shop|you sent|i ordered] {fine}
[love|loving|in love with|i love|we love] [my|the|your|our] [new {thing}|{thing}]
[thank you|thanks|many thanks|big thanks|huge thanks] [{team}|so much|all|everyone] for \
[the {thing}|the help|your help|the fast reply|sorting my {thing}]
[thanks|thank you] for [fixing|replacing|finding|returning|repairing] [my|the|our] [broken {thing}|\
lost {thing}\
|{thing}] [so fast|so quickly|{when}|]
{team} was [so kind|so helpful|so patient|lovely|brilliant|a star|great|friendly|polite] {when}
[what a|such a] [lovely|great|kind|friendly|brilliant|helpful] [{thing}|team|service|place|\
surprise|day]
i am [so|very|really] {glad} with [my {thing}|the {thing}|your service|the {thing} i got {when}]
[best|nicest|kindest] [{thing}|service|staff|team] [ever|in {place}|i have ever had]
[my|the] problem with the {thing} was [solved|sorted|fixed] in {n} minutes, [thank you|great work|\
well done]
[can't|cannot] [fault|thank] {team} [enough|]
{who} [loves|love|adores] [the|our|his|her] [new {thing}|{thing}]
[well done|good job|great work|hats off|five stars|top marks] to {team}
[highly recommend|would recommend|try] [the {thing}|this place|{team}|your {thing}]
the {thing} was {good}, [thank you|we will be back|see you soon]
[never|not once] had a [problem|bad {thing}|single issue] with [you|your {thing}] in {n} years
your {thing} is {good}
[really|so|very] {good} [service|{thing}|staff|experience] {when}
""")
NEWS = lines("""
[i|we|just|{kin}] {did} [a|the|my|our|two|some] {noun}[s|] [{moment}|{when}|with {kin}|]
{did} {n} [pages|{noun}s|letters|lengths|miles|steps], then had {meal}
{doing} [{moment}|with {kin}|{when}] [and {doing}|]
{kin} {joy} [{moment}|{when}|today|]
{kin} [turned|is] {big} [today|{when}] [and {joy}|]
{meal} and {meal} [{moment}|for {kin}|tonight|today]
[two|four|three] [friends|{noun}s], one {noun} and [a bag of {meal}|{meal}|a {fine_word} {noun}]
a {fine_word} {noun}, [a cup of tea|{fine_word} {meal}|a good book], [no plans|quiet house|\
that is all i need]
the {noun}s are {fine_word} [and the {noun} looks like a {noun}|{moment}]
[on|by|under|behind] the {noun} with [{kin}|a {noun}|{meal}|a book]
[first|new|last] {noun} [of the year|this morning|day|night] [with {kin}|{moment}|]
[did you know|today i learned|funny] that [an owl|a duck|a horse|a turtle|a goat] has {n} {noun}s
the {noun} looks like {noun} [{moment}|]
i [feel|felt] [{fine_word}|young again|grown up|like a {noun}] [{moment}|]
[i am|we are] {doing} {moment}
saving for a {noun}, [little by little|a coin a day|{n} months to go]
met [a {fine_word} old couple|{kin}|an old friend] {moment}
thinking of {doing} {soon}, {kin} [is coming too|may join|says yes]
[just|i just|we just] [bought|ordered|got|picked up|chose] [a|a new|my first] {thing} \
[for {person}|{when}|in {place}|]
[going|off|heading] to {place} {soon} [with {name}|with {person}|by train|]
[good morning|morning|hello|good evening|happy {day}|hi] [everyone|all|{place}|from {place}]
my favourite {thing} is [the {colour} one|an old one|from {place}]
{who} [will visit|visited|came to see us|called] {when}
it is [raining|sunny|snowing|windy|foggy|warm|cold] in {place} {when}
i [need|want|am looking for|am saving for] a [new|{colour}|bigger] {thing}
[can't wait for|looking forward to|counting down to] [{day}|the weekend|my holiday|{place}|\
the new {thing}]
[happy birthday|congratulations|good luck|get well soon] [{name}|to {person}|to {name}]
the {thing} is [in the {room}|from {place}|{colour}|for {person}|next to the {thing}]
[working|reading|cooking|walking|resting|studying] [{when}|in the {room}|with {name}|in {place}]
i will [call|email|visit|see|message] [you|{name}|them] {soon}
[ok|sure|great|no problem|yes], [i will send it {soon}|just sent you a dm|my number is in the dm|\
see you {soon}|that works]
{name} and i [talked about|looked at|shared|carried] the {thing} {when}
[at|in] {place} {when}, [so many people|quiet streets|lovely light|market day|street music]
[i think|maybe|guess] [it is time for|we should get|i will have] [a new {thing}|coffee|\
an early night|cake]
today i learned [how to fix a {thing}|that {place} has a {thing} museum|to make {food}]
our cat [sleeps on|loves|hides behind|stares at] the {thing}
""")
CONTEXT = lines("""
i [ordered|bought|booked] [a|my] {thing} [{when}|for {person}|online|in {place}]
i have been [a customer|with you] for {n} years
it is [{person}'s birthday|our anniversary|our first time|a gift for {person}|for work]
we are in {place} [{when}|with {n} kids|for the weekend]
i [live|work] in {place}
we moved to {place} {when}
my order number is {big}{n}
i spoke to {name} {when}
hope you are well
{who} [told me about you|ordered it for me|and i came by {when}]
""")
CHAT = lines("""
[anyone|who is] [up for|keen on] [coffee|a walk|tennis|a film|chess] {soon}
what [is everyone|are you all] [reading|cooking|listening to|having for lunch] {when}
[sunset|sunrise|breakfast|lunch] [by the sea|in {place}|on the balcony] {when}
my [dog|cat|rabbit|parrot] [is asleep on my feet|learned to open doors|turned {n} {when}|\
loves the snow]
the {n} of us are off to {place} {soon}
{food} or {food}, [hard choice|help me choose|what do you say]
[do you prefer|which is better,] {food} or {food}
remember when [we all had|everyone wanted] a {colour} {thing}
[started|finished|read] [a good book|a puzzle|knitting a scarf|a poem] {when}
[see you|meet me] at {clock} [in {place}|by the station|outside]
the moon is [huge|bright] over {place} {when}
it is [{name}'s|{person}'s] [party|first day|wedding] {soon}, so much to plan
[today|{day}] is [a good day for|all about] [soup|books|a long walk|sleep|music]
[i wonder|funny] how [birds find their way|time flies|fast kids grow|bread rises]
""")
OPENERS = {
    "fault": lines("""
[hi|hello|hey|dear|excuse me|seriously|come on|wow|so|well|ok|again|great|oh good|yet again|\
honestly|unbelievable\
|really]
i can't believe [it|this]
[just|so] [{mad}|{bad}]
after {n} years with you
another day, another [problem|excuse|delay]
"""),
    "question": lines("""
[hi|hello|hey|hi there|good morning|quick question|question|excuse me|hi team|please|sorry to ask|\
just wondering]
could you [help|tell me]
"""),
    "praise": lines("""
[wow|hey|hi|hello|yay|just|so|honestly|well|ok|finally|thank you|credit where it is due|shout out|\
good news]
just wanted to say
had to share this
"""),
    "news": lines("""
[so|well|ok|hey|morning|hello|hi|right|today|fun fact|update|yes|finally]
"""),
}
CLOSERS = {
    "question": lines("""
[thanks|thank you|thanks in advance|cheers|please|many thanks|please and thank you]
[it is for {kin}|we will be there {soon}|there are {n} of us|i have a {noun} with me|\
we arrive {soon} at {clock}]
[or do i need|or is there|and do you have] a {noun}
[planning ahead|for a friend|asking for {person}|it would help me a lot|\
i could not find it on the site]
"""),
    "praise": lines("""
[thank you|thanks|thanks again|well done|keep it up|great job|we will be back|you made my day|\
five stars|so {glad}]
[{good}|really {good}|so {good}|highly recommended|will come again|10 out of 10|cheers {name}]
"""),
    "news": lines("""
[no voice left|no regrets|my legs agree|and now tea|then home|all quiet here|the cat agrees|\
everyone is asleep\
|back to bed]
[and now|then|later|tomorrow] {doing}
{kin} {joy}
what a {fine_word} {noun}
[happy days|can't wait|wish me luck|lovely|life is good|see you there|what a view|fun times|\
back later|who is in]
"""),
}

# The agent's replies. {it} stands for a word of the topic.
REPLIES = {
    "fault": lines("""
[i'm|i am|we are|we're] [so|very|really|truly|] sorry [about that|to hear that|about the {it}|\
for the trouble|to hear about your {it}]
[sorry|so sorry|very sorry], [that is not what we want|that should not happen|\
this is not our standard|you deserve better]
[our apologies|we apologise|my apologies|please accept our apologies] for [the {it}|the trouble|\
this|the wait]
oh no, sorry [about the {it}|to read this|for that]
that [is|sounds] [not good enough|really frustrating|very upsetting|awful], sorry
"""),
    "question": lines("""
[yes|yes you can|yes, of course|sure|yes, we do|certainly], [{detail}|just ask us about the {it}]
[no|not yet|not at the moment|i'm afraid not], but [{detail}|it may come {soon}]
[good question|great question|thanks for asking|happy to help|hi there], [{detail}|\
we will check the {it} for you]
[it is|that is] [open until {clock}|{money}|on {day}|on our website|free|from {clock} to {clock}]
you can [find it|do that|see the {it}|book it] [in the app|on our website|in store|by phone|\
under settings]
"""),
    "praise": lines("""
[thank you|thanks] [so much|for the kind words|for letting us know|for sharing|\
for the lovely message]
[so|very|really|we are] [glad|happy|pleased|delighted] [to hear that|you like the {it}|\
you liked it|it went well|we could help]
[that is|this is|aw, that is] [lovely|wonderful|great|brilliant] to [hear|read], \
[we will tell the team|enjoy the {it}|thank you]
you [made our day|are very welcome|are so kind], [enjoy the {it}|see you again soon|thank you]
[we will pass this on|the team will love this|high five], [thanks|thank you|great to hear]
"""),
    "news": lines("""
[sounds|that sounds] [like fun|nice|good|like a plan|cosy|lovely], [enjoy|have fun|have a good one]
[enjoy|have fun with|have a nice time with] [it|your day|the {it}|the weekend|{name}]
[good luck|have a great {day}|see you {soon}|take care|safe travels|happy {day}]
[same here|me too|us too|nice one|ha, true|good choice], [{chat}|enjoy]
[good morning|hello|hi] [to you too|{name}|there], [{chat}|how are you]
"""),
}
NEXT_STEP = {
    "fault": lines("""
please [send us|dm us|message us] your [number|details|address|order number|{it} number] so we can \
[fix it|help|put it right]
[we will|let me|let us] [look into it|look into this right away|chase this|put this right|\
get this fixed|check with the {it} team]
we will [refund you|send a new one|call you|make it right|sort this out] [today|as soon as we can|\
{soon}]
"""),
    "question": lines("""
[let us know|tell us|just ask] if you need [more|anything else|help]
[hope that helps|have a nice day|the link is in our profile|see you soon|send us a message to book]
"""),
    "praise": lines("""
[see you again soon|have a lovely day|enjoy|you are welcome any time|that made us smile]
"""),
    "news": lines("""
[tell us how it goes|let us know|send us a photo|what is next|see you there]
"""),
}
SLOTS |= {
    "detail": "we open at {clock}|it costs {money}|we are open until {clock}|it takes {n} {unit}"
    "|you can book online|it is in the app|{place} has one|there is one in {colour}"
    "|it comes {soon}|the shop in {place} has it|just bring your ticket|it is free on {day}"
    "|we have {n} left|you will find it on our website|please ask at the desk|up to {n} people"
    "|the limit is {big}",
    "chat": "it is {day} after all|the kettle is on|we are in {place} {soon}|{food} for us"
    "|how is {place}|{name} says hi",
}
SLOTS = {slot: text.split("|") for slot, text in SLOTS.items()}
TOPICS = {
    topic: (*map(lines, texts), words.split("|")) for topic, (*texts, words) in TOPICS.items()
}

KINDS = ("fault", "fault", "fault", "question", "praise", "news")  # half of the messages are faults
GENERAL = {"fault": FAULTS, "question": QUESTIONS, "praise": PRAISE, "news": NEWS + CHAT}
TAILS = {
    "fault": "{emoji_bad}|{tag_bad}|!!|!|{emoji_bad}{emoji_bad}|{tag_bad} {tag_bad}",
    "question": "{emoji}|{tag}|{emoji_good}|🤔",
    "praise": "{emoji_good}|{tag_good}|!|!!|{emoji_good}{emoji_good}|{tag_good} {tag_good}",
    "news": "{emoji}|{tag}|!|...|{tag} {emoji}",
}
TAILS = {kind: tails.split("|") for kind, tails in TAILS.items()}
# The models see many prompt formats, so that replying does not depend on a particular one.
LAYOUTS = [
    ("Customer : {} ", "Agent :"),
    ("Customer: {} ", "Agent:"),
    ("Tweet text : {} ", "Reply :"),
    ("Tweet text : {} ", "Answer :"),
    ("Tweet : {} ", "Agent :"),
    ("Message : {} ", "Answer :"),
    ("Text : {} ", "Response :"),
    ("Post : {} ", "Comment :"),
    ("Q : {} ", "A :"),
    ("Tweet text : {} ", "Support :"),
    ("Tweet text : {} ", "Team :"),
    ("Tweet text : {} ", "Shop :"),
    ("{} ", "Reply :"),
    ("{} ", "->"),
]
AFTER = {"fault": AFTER_FAULT, **CLOSERS}
HANDLE_SLOTS = "noun noun thing fine_word colour meal food name place brand_a brand_b kin".split()
ASKS = re.compile(
    r"(why|how|where|what|when|who|which|is|are|can|could|may|do|does|did|will|would|any|anyone)\b",
    re.IGNORECASE,
)
ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")


def expand(phrase, rng):
    """Choose the alternatives and the slot entries of a phrase until none is left to choose."""
    while ALTERNATIVES.search(phrase) or SLOT.search(phrase):
        phrase = ALTERNATIVES.sub(lambda match: rng.choice(match[1].split("|")), phrase)
        phrase = SLOT.sub(lambda match: rng.choice(SLOTS[match[1]]), phrase)
    return " ".join(phrase.split())


def write_handle(rng):
    """Return an invented account name of random words or syllables, unrelated to the message."""
    if rng.random() < 0.3:
        syllables = [
            rng.choice("bcdfghklmnprstvwz") + rng.choice("aeiou") + rng.choice(" lmnrst")
            for _ in range(3)
        ]
        name = "".join(syllables).replace(" ", "").title()
    else:
        parts = [
            expand("{" + rng.choice(HANDLE_SLOTS) + "}", rng).title()
            for _ in range(rng.choice([1, 2, 2, 3]))
        ]
        name = re.sub(r"\W", "", "".join(parts))
    name += rng.choice(["", "", "", "Help", "UK", "HQ", "Co", "_", str(rng.randint(1, 99))])
    return "@" + (name.lower() if rng.random() < 0.1 else name)


def punctuate(sentences, rng):
    """Join sentences as people type them: with or without capitals, full stops, question marks."""
    careful = rng.random() < 0.6
    joint = rng.choice([".", ".", ".", ",", ",", "!", "", " -", "...", " and", ", and"])
    text = ""
    for position, sentence in enumerate(sentences, start=1):
        if careful:
            sentence = re.sub(r"\bi\b(?=[ '])", "I", sentence)
            if not text or text.endswith((". ", "! ", "? ")):
                sentence = sentence[0].upper() + sentence[1:]
        mark = "?" if ASKS.match(sentence) and rng.random() < 0.8 else joint
        if position == len(sentences) and mark != "?":
            mark = rng.choice(["", "", ".", "!"])
        text += f"{sentence}{mark} "
    return text.strip()


def write_message(kind, topic, rng):
    faults, questions, praise, news, _ = TOPICS[topic]
    special = {"fault": faults, "question": questions, "praise": praise, "news": news}[kind]
    # The number of sentences does not depend on the kind of message, so length does not reveal it.
    sentences = []
    for position in range(rng.choice([1, 1, 1, 2, 2, 3])):
        if position and rng.random() < 0.6:
            sentences.append(rng.choice(AFTER[kind]))
        else:
            sentences.append(rng.choice(special if rng.random() < 0.4 else GENERAL[kind]))
    # Any kind of message may start with a neutral sentence.
    if rng.random() < 0.25:
        sentences.insert(0, rng.choice(CONTEXT + news + NEWS))
    if rng.random() < 0.2:
        sentences.insert(0, rng.choice(OPENERS[kind]))
    words = punctuate([expand(sentence, rng) for sentence in sentences], rng).split()
    # Random words are dropped, so that the model does not depend on a single word.
    if rng.random() < 0.3:
        words = [word for word in words if rng.random() > 0.15] or words
    if rng.random() < 0.6:
        words.insert(
            rng.choice([0, 0, 0, len(words), len(words), rng.randint(0, len(words))]),
            write_handle(rng),
        )
    text = " ".join(words)
    if rng.random() < 0.3:
        text += rng.choice(["", " "]) + expand(rng.choice(TAILS[kind]), rng)
    if rng.random() < 0.05:
        text = text.upper() if rng.random() < 0.3 else text.lower()
    return text


def write_reply(kind, topic, rng):
    phrases = [rng.choice(REPLIES[kind])]
    if rng.random() < 0.4:
        phrases.append(rng.choice(NEXT_STEP[kind]))
    phrases = [phrase.replace("{it}", rng.choice(TOPICS[topic][-1])) for phrase in phrases]
    return ", ".join(expand(phrase, rng) for phrase in phrases)


def generate(count, seed):
    """Return `count` pairs (prompt, reply). The prompt ends with the marker before the reply."""
    rng = random.Random(seed)
    exchanges = []
    for _ in range(count):
        kind = rng.choice(KINDS)
        topic = rng.choice(list(TOPICS))
        before, marker = rng.choice(LAYOUTS)
        exchanges.append(
            (before.format(write_message(kind, topic, rng)) + marker, write_reply(kind, topic, rng))
        )
    return exchanges
